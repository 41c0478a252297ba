"""Experts per token in each MoE layer under `fisher`, by task.

Run it with the table and the picture to write::

    python docs/pictures/who_gets_more.py \
        benchmarks/adaptive_k/results/2026-12-01-who-gets-more.csv docs/images/who-gets-more.svg
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import matplotlib.pyplot as plt
from plots import GREY, STYLES, label_ends, save

POLICY = "fisher"
TOP_K = 6


def main(source: Path, target: Path) -> None:
    """Draw a curve per task, and the router's own number."""
    with source.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["policy"] == POLICY]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure, axis = plt.subplots(figsize=(7.6, 3.9), layout="constrained")
    ends = []
    for task, style in zip(tasks, STYLES, strict=False):
        mine = [row for row in rows if row["task"] == task]
        layers = [int(row["layer"]) for row in mine]
        means = [float(row["experts_per_token"]) for row in mine]
        axis.plot(layers, means, markersize=3.5, linewidth=1.5, **style)
        ends.append((layers[-1], means[-1], task, style["color"]))
    axis.set_ylim(0, None)
    axis.set_xlim(-0.5, max(end[0] for end in ends) + 0.6)
    axis.axhline(TOP_K, color=GREY, linewidth=1, linestyle=(0, (4, 3)))
    axis.text(
        axis.get_xlim()[1], TOP_K, "the router's top-6 ", color=GREY, ha="right", va="bottom",
        fontsize=8.5,
    )  # fmt: skip
    label_ends(axis, ends, gap=0.06)
    axis.set_xlabel("MoE layer")
    axis.set_ylabel("experts per token")
    axis.set_title("Middle layers need fewest experts")
    axis.grid(axis="y", color="#e6e8eb", linewidth=0.7)
    axis.set_axisbelow(True)
    save(figure, target)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
