"""Which command when: commands in boxes, the files between them on the arrows.

Writes docs/images/pipeline.svg; with `--check` it compares instead.
"""

from __future__ import annotations

from pathlib import Path

from svg import BLUE, GREEN, GREY, INK, ORANGE, VERMILION, Drawing, write_or_check

TARGET = Path(__file__).parents[1] / "images" / "pipeline.svg"
LEFT, BOX, TEXT = 86, 246, 362
STEP, HIGH = 84, 40

# Command, colour, whether it can be left out, when to use it, the file that it writes.
STEPS = (
    (
        "carve", GREY, True,
        ("Only if you start from a dense model", "(Hugging Face directory or GGUF)."),
        "moe/", "checkpoint",
    ),
    (
        "calibrate", BLUE, False,
        ("Once per model: measures which experts", "your task files use."),
        "stats.safetensors", "statistics",
    ),
    (
        "prune · decompose · allocate", BLUE, False,
        ("Decide which experts stay, their ranks,", "and experts per token. No weight moves."),
        "plan.json", "plan",
    ),
    (
        "apply", BLUE, False,
        ("Carries the plan out.",),
        "pruned/", "checkpoint",
    ),
    (
        "recover", BLUE, True,
        ("Wins back quality on the task's lines:", "least squares or training."),
        "recovered/", "checkpoint",
    ),
    (
        "export", GREEN, False,
        ("ONNX graphs for one target; tasks share", "weights; compared and judged."),
        "bundle/", "bundle",
    ),
    (
        "compile", GREEN, True,
        ("TensorRT targets only: on the device, or", "ahead of time for RTX GPUs."),
        "bundle/engines/", "engine",
    ),
    (
        "run · bench · Session", VERMILION, False,
        ("On the device, without torch.",),
        "", "",
    ),
)  # fmt: skip
ASIDE = (
    ("evaluate", "a checkpoint or a bundle: score with a 95% interval"),
    ("sweep", "prune to evaluate at many fractions: how much can go"),
    ("inspect", "any of these files: what it is, sizes, where it came from"),
    ("merge-stats", "adds up statistics that several machines measured"),
    ("verify", "a bundle: digests, graph inputs, external data"),
    ("doctor", "this machine: what is installed, what is missing"),
    ("families", "the model families, and a trial of one"),
)


def draw() -> Drawing:
    """Draw the pipeline downwards, what spans several commands on its left."""
    foot = 36 + STEP * len(STEPS)
    drawing = Drawing(700, foot + 26 * len(ASIDE) + 40, "edgemoe: which command when")
    for number, (command, colour, optional, when, file, kind) in enumerate(STEPS):
        y = 24 + STEP * number
        drawing.box(LEFT, y, BOX, HIGH, stroke=colour, dashed=optional)
        drawing.text(
            LEFT + BOX / 2, y + 25, command, size=14, anchor="middle", mono=True, bold=True
        )
        for row, line in enumerate(when):
            drawing.text(TEXT, y + (25 if len(when) == 1 else 16) + 19 * row, line, size=14)
        if file:
            middle = LEFT + BOX / 2
            drawing.arrow([(middle, y + HIGH), (middle, y + STEP)])
            drawing.text(middle + 12, y + HIGH + 27, file, size=13, colour=INK, mono=True)
            right = middle + 12 + 8.2 * len(file) + 10
            drawing.text(right, y + HIGH + 27, kind, size=12, colour=GREY)
    _span(drawing, 62, 1, 5, "export --task: all in one, without recover", GREEN)
    _span(drawing, 30, 1, 4, "sweep: all at many fractions", ORANGE)
    drawing.line([(24, foot - 2), (676, foot - 2)], colour="#d0d7de")
    drawing.text(
        676, foot - 12, "dashed: only where needed", size=12, colour=GREY, anchor="end"
    )
    drawing.text(24, foot + 24, "Beside it", size=13, colour=GREY)
    for number, (command, what) in enumerate(ASIDE):
        y = foot + 50 + 26 * number
        drawing.text(LEFT, y, command, size=14, mono=True, bold=True)
        drawing.text(LEFT + 120, y, what, size=14)
    return drawing


def _span(drawing: Drawing, x: float, first: int, last: int, text: str, colour: str) -> None:
    top, bottom = 24 + STEP * first, 24 + STEP * last + HIGH
    drawing.line([(x + 8, top), (x, top), (x, bottom), (x + 8, bottom)], colour=colour)
    drawing.text(
        x - 6, (top + bottom) / 2, text, size=13, colour=INK, anchor="middle", turned=True
    )


if __name__ == "__main__":
    write_or_check(draw(), TARGET)
