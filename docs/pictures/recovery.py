"""What least squares win back: the rise of perplexity before and after, with 95% intervals.

Run it with the table and the picture to write::

    python docs/pictures/recovery.py \
        benchmarks/compression/results/2026-11-23-methods.csv docs/images/recovery.svg
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import matplotlib.pyplot as plt
from plots import BLUE, GREY, LIGHT, VERMILION, percent, save, shade_allowed

METHODS = {"reap": "reap (fewer experts)", "heapr": "heapr (narrower experts)"}
CUTS = (0.75, 0.625, 0.5, 0.375)
ALLOWED = 0.05
# Recovery, colour, marker, whether it is filled.
WAYS = (
    ("", VERMILION, "o", "pruned alone"),
    ("least-squares", BLUE, "s", "then least squares"),
)


def main(source: Path, target: Path) -> None:
    """Draw a row of panels per method, a column per task; an arrow for each cut."""
    with source.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["task"] == row["judged_on"]]
    tasks = list(dict.fromkeys(row["task"] for row in rows if row["task"]))
    figure, grid = plt.subplots(
        2, len(tasks), figsize=(11, 6.4), sharex=True, sharey="row", layout="constrained"
    )
    for line, (method, title) in zip(grid, METHODS.items(), strict=True):
        for axis, task in zip(line, tasks, strict=True):
            for place, keep in enumerate(CUTS):
                ends = []
                for recovery, colour, marker, _ in WAYS:
                    value, low, high = _find(rows, task, method, recovery, keep)
                    x = place + (-0.13 if not recovery else 0.13)
                    axis.errorbar(
                        x, value, yerr=[[value - low], [high - value]], color=colour,
                        marker=marker, markersize=6, capsize=3, linewidth=1.4, zorder=3,
                    )  # fmt: skip
                    ends.append((x, value))
                axis.annotate(
                    "", ends[1], ends[0], zorder=1,
                    arrowprops={"arrowstyle": "-", "color": LIGHT, "linewidth": 1.5},
                )  # fmt: skip
            axis.set_title(f"{task}, {title}")
            axis.set_xticks(range(len(CUTS)), [f"{100 * keep:g}%" for keep in CUTS])
            axis.yaxis.set_major_formatter(lambda value, _: percent(value))
            axis.grid(axis="y", color="#e6e8eb", linewidth=0.7)
            axis.set_axisbelow(True)
        for axis in line:
            # Room for a word below zero.
            axis.set_ylim(-0.11 * axis.get_ylim()[1], None)
            axis.axhline(0, color=GREY, linewidth=0.8)
            shade_allowed(axis, ALLOWED, "5% or less")
        line[0].set_ylabel("rise of perplexity")
    for axis in grid[-1]:
        axis.set_xlabel("routed experts' parameters kept")
    first = grid[0][0]
    for number, (_, colour, marker, text) in enumerate(WAYS):
        height = 0.93 - 0.1 * number
        first.plot(0.05, height, marker, color=colour, transform=first.transAxes, markersize=6)
        first.text(0.09, height, text, color=colour, transform=first.transAxes, va="center")
    figure.supxlabel(
        "2026-11-23, 2 x86-64 cores; lines are 95% intervals.",
        fontsize=8, color=GREY, x=0.99, ha="right",
    )  # fmt: skip
    save(figure, target)


def _find(
    rows: list[dict[str, str]], task: str, method: str, recovery: str, keep: float
) -> tuple[float, float, float]:
    """Return the rise and its interval; these methods have one seed."""
    (row,) = (
        row
        for row in rows
        if (row["task"], row["method"], row["recovery"]) == (task, method, recovery)
        and float(row["keep"]) == keep
    )
    return float(row["drop"]), float(row["drop_ci95_low"]), float(row["drop_ci95_high"])


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
