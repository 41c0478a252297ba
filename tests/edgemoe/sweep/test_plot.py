"""The plot is a picture of what was found."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from edgemoe.parallel.workers import InProcess
from edgemoe.sweep import plot
from edgemoe.sweep.methods import read_methods
from edgemoe.sweep.request import SweepRequest
from edgemoe.sweep.sweep import run_sweep

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

image = pytest.importorskip("matplotlib.image")


def colour_share(picture: NDArray[Any], colour: str) -> float:
    wanted = [int(colour[start : start + 2], 16) for start in (1, 3, 5)]
    pixels = np.rint(picture[..., :3] * 255)
    return float((np.abs(pixels - wanted).max(axis=-1) <= 2).mean())


def test_a_panel_per_task_and_a_line_per_method(folder: Path, tmp_path: Path) -> None:
    pictures = []
    for count in (1, 2):
        tasks = {name: folder / f"{name}.jsonl" for name in ("low", "high")[:count]}
        request = SweepRequest(
            model=folder / "moe",
            output=tmp_path / f"report{count}",
            tasks=tasks,
            methods=read_methods(["reap,random"], []),
            keeps=(0.75, 0.5),
            seeds=(0, 1, 2),
            max_drop=2.0,
            accept_large_drop=True,
            accept_weak_evidence=True,
            threads=1,
        )
        run_sweep(request, InProcess())
        pictures.append(image.imread(request.output / "sweep.png"))
    one, two = pictures
    width, height = (int(inches * plot._DPI) for inches in plot._PANEL_INCHES)
    assert one.shape[:2] == (height, width)
    assert two.shape[:2] == (height, 2 * width)
    for picture in pictures:
        # Lines and markers of the two methods, and no third; axes in black; the rest is light.
        assert colour_share(picture, plot._COLOURS[0]) > 0.001
        assert colour_share(picture, plot._COLOURS[1]) > 0.001
        assert colour_share(picture, plot._COLOURS[2]) == 0
        assert colour_share(picture, plot._THRESHOLD_COLOUR) > 0.0005
        assert 0.5 < colour_share(picture, "#ffffff") < 0.98
    # The second panel is as full as the first.
    left, right = two[:, :width], two[:, width:]
    assert (
        0.5 < colour_share(right, plot._COLOURS[0]) / colour_share(left, plot._COLOURS[0]) < 2
    )
