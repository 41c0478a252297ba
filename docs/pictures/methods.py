"""Five pruning methods on three tasks: what each cut costs, before and after least squares.

    python docs/pictures/methods.py benchmarks/compression/results/2026-11-23-methods.csv \
        docs/images/methods.svg

Five of the twelve methods stand for the rest: the best one, the best that drops whole experts,
the default of an export, one between, and chance.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.ticker import NullFormatter, NullLocator
from plots import GREY, STYLES, label_ends, save, shade_allowed

METHODS = ("random", "reap", "camera", "naee", "heapr")
ALLOWED = 0.05
TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)
WAYS = {"": "pruned alone", "least-squares": "then least squares"}


def main(source: Path, target: Path) -> None:
    """Draw a row of panels before and one after the recovery, a column per task."""
    with source.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["task"] == row["judged_on"] != ""]
    rows = [row for row in rows if row["task"]]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure, grid = plt.subplots(
        2, len(tasks), figsize=(11, 6.6), sharex=True, sharey=True, layout="constrained"
    )
    for line, (recovery, way) in zip(grid, WAYS.items(), strict=True):
        for axis, task in zip(line, tasks, strict=True):
            axis.set_yscale("log")
            axis.set_ylim(0.01, 1.4)
            axis.set_xlim(0.77, 0.355)
            ends = []
            for method, style in zip(METHODS, STYLES, strict=True):
                keeps, rises = _curve(rows, task, method, recovery)
                axis.plot(keeps, rises, markersize=5, linewidth=1.6, **style)
                ends.append((keeps[0], rises[0], method, style["color"]))
            shade_allowed(axis, ALLOWED, "5% or less")
            label_ends(axis, ends, gap=0.058, log=True)
            axis.set_title(f"{task}: {way}")
            axis.set_yticks(TICKS, [f"+{100 * tick:g}%" for tick in TICKS])
            axis.yaxis.set_minor_locator(NullLocator())
            axis.yaxis.set_minor_formatter(NullFormatter())
            axis.grid(axis="y", color="#e6e8eb", linewidth=0.7)
            axis.set_axisbelow(True)
    for axis in grid[-1]:
        axis.set_xticks((0.75, 0.625, 0.5, 0.375), ("75%", "62.5%", "50%", "37.5%"))
        axis.set_xlabel("routed experts' parameters kept")
    for line in grid:
        line[0].set_ylabel("rise of perplexity")
    figure.supxlabel(
        "2026-11-23, 2 x86-64 cores. Means; the table has intervals and seven more methods.",
        fontsize=8, color=GREY, x=0.99, ha="right",
    )  # fmt: skip
    save(figure, target)


def _curve(
    rows: list[dict[str, str]], task: str, method: str, recovery: str
) -> tuple[list[float], list[float]]:
    """Return the cuts from the deepest on, and the mean rise of the seeds at each."""
    found: dict[float, list[float]] = {}
    for row in rows:
        if (row["task"], row["method"], row["recovery"]) == (task, method, recovery):
            found.setdefault(float(row["keep"]), []).append(float(row["drop"]))
    keeps = sorted(found)
    return keeps, [sum(found[keep]) / len(found[keep]) for keep in keeps]


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
