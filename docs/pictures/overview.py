"""The drawing at the top of README: a workstation makes a bundle, a device runs it.

Writes docs/images/overview.svg; with `--check` it compares instead.
"""

from __future__ import annotations

from pathlib import Path

from svg import BLUE, GREEN, GREY, INK, VERMILION, Drawing, write_or_check

TARGET = Path(__file__).parents[1] / "images" / "overview.svg"
USED = {
    "A": (1, 1, 0, 1, 0, 1, 1, 0, 1, 0),
    "B": (0, 1, 1, 1, 0, 0, 1, 1, 1, 0),
}


def draw() -> Drawing:
    """Draw the workstation on the left, the bundle between, the device on the right."""
    drawing = Drawing(820, 236, "edgemoe: a workstation makes a bundle, a device runs it")
    drawing.text(24, 32, "workstation", size=13, colour=GREY)
    drawing.box(20, 44, 150, 150, stroke=INK)
    drawing.text(95, 70, "MoE model", anchor="middle", bold=True)
    for row in range(4):
        for column in range(5):
            drawing.box(38 + 24 * column, 84 + 18 * row, 18, 12, stroke=GREY, fill="#eaeef2")
    drawing.text(95, 180, "all experts", size=12, colour=GREY, anchor="middle")

    drawing.arrow([(170, 119), (246, 119)])
    drawing.text(208, 108, "measure", size=12, colour=GREY, anchor="middle")
    drawing.text(208, 138, "choose", size=12, colour=GREY, anchor="middle")

    drawing.box(246, 44, 230, 150, stroke=BLUE)
    drawing.text(361, 70, "experts each task uses", anchor="middle", bold=True)
    for number, (task, used) in enumerate(USED.items()):
        y = 92 + 30 * number
        drawing.text(262, y + 12, f"task {task}", size=12)
        for column, is_used in enumerate(used):
            both = all(other[column] for other in USED.values())
            colour = GREEN if both else (BLUE, VERMILION)[number]
            drawing.box(
                310 + 15.6 * column,
                y,
                12,
                15,
                stroke=colour if is_used else "#d0d7de",
                fill=colour if is_used else "#ffffff",
            )
    drawing.text(361, 168, "green: used by both tasks,", size=12, colour=GREY, anchor="middle")
    drawing.text(361, 184, "stored once", size=12, colour=GREY, anchor="middle")

    drawing.arrow([(476, 119), (560, 119)])
    drawing.text(518, 108, "bundle", size=12, colour=INK, anchor="middle", bold=True)
    drawing.text(518, 138, "ONNX", size=12, colour=GREY, anchor="middle")

    drawing.text(566, 32, "device: Jetson, GPU or CPU", size=13, colour=GREY)
    drawing.box(560, 44, 238, 150, stroke=VERMILION)
    drawing.text(679, 70, "edgemoe_runtime", anchor="middle", mono=True, bold=True)
    lines = (
        "TensorRT, onnxruntime; no torch",
        "fewer experts per token when",
        "late, hot or short of power;",
        "and it says why",
    )
    for number, line in enumerate(lines):
        drawing.text(679, 98 + 22 * number, line, size=12.5, anchor="middle")
    drawing.text(410, 220, "quality before and after is measured and stored in the bundle",
                 size=12, colour=GREY, anchor="middle")  # fmt: skip
    return drawing


if __name__ == "__main__":
    write_or_check(draw(), TARGET)
