"""Heat map, layer by expert, of how often each of two tasks chooses each expert.

    python docs/pictures/task_experts.py stats.safetensors docs/images/task-experts.svg

The first two tasks of a statistics file are drawn, and where they differ. Only counts are read.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from plots import BLUE, GREY, VERMILION, percent, save
from safetensors import safe_open

DIFFERENCE = LinearSegmentedColormap.from_list("difference", [VERMILION, "#ffffff", BLUE])


def read_counts(path: Path) -> dict[str, np.ndarray]:
    """Return the share of a task's tokens that choose each expert.

    Args:
        path: A statistics file of a model whose layers have equal numbers of experts.

    Returns:
        By task: float64 [layers, experts].
    """
    shares: dict[str, dict[int, np.ndarray]] = {}
    with safe_open(path, framework="numpy") as statistics:
        for name in statistics.keys():  # noqa: SIM118 (not a dictionary)
            task, layer, what = name.split("/")
            if what == "count":
                tokens = statistics.get_tensor(f"{task}/{layer}/tokens")
                shares.setdefault(task, {})[int(layer)] = statistics.get_tensor(name) / tokens
    return {
        task: np.stack([rows[layer] for layer in sorted(rows)]) for task, rows in shares.items()
    }


def main(source: Path, target: Path) -> None:
    """Draw two tasks and their difference."""
    shares = read_counts(source)
    (one, first), (other, second) = list(shares.items())[:2]
    top = float(max(first.max(), second.max()))
    panels = (
        (one, first, "Blues", 0.0, top),
        (other, second, "Blues", 0.0, top),
        (f"{one} minus {other}", first - second, DIFFERENCE, -0.5, 0.5),
    )
    figure, axes = plt.subplots(1, 3, figsize=(9.6, 6.2), sharey=True, layout="constrained")
    for axis, (title, values, colours, low, high) in zip(axes, panels, strict=True):
        image = axis.imshow(values, cmap=colours, vmin=low, vmax=high, aspect="auto")
        axis.set_title(title)
        axis.set_xlabel("expert")
        axis.set_xticks(range(0, values.shape[1], 3))
        axis.spines[:].set_visible(False)
        bar = figure.colorbar(image, ax=axis, orientation="horizontal", pad=0.01, aspect=26)
        signed = low < 0
        bar.ax.xaxis.set_major_formatter(
            (lambda value, _: percent(value)) if signed else (lambda value, _: f"{value:.0%}")
        )
        bar.outline.set_visible(False)
        bar.set_label(
            "percentage points" if signed else "tokens that choose it", fontsize=9, color=GREY
        )
    axes[0].set_ylabel("MoE layer")
    save(figure, target)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
