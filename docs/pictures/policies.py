"""Perplexity against experts per token, for four policies on three tasks.

Run it with the table and the picture to write::

    python docs/pictures/policies.py \
        benchmarks/adaptive_k/results/2026-11-30-policies.csv docs/images/policies.svg
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import matplotlib.pyplot as plt
from plots import GREY, INK, STYLES, label_ends, percent, save, shade_allowed

POLICIES = ("fixed", "ada-k", "alloc-l", "fisher")
TOP_K = 6.0
ALLOWED = 0.05


def main(source: Path, target: Path) -> None:
    """Draw a panel per task; fewer experts to the right."""
    with source.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure, axes = plt.subplots(
        1, len(tasks), figsize=(11, 4.3), sharex=True, sharey=True, layout="constrained"
    )
    for axis, task in zip(axes, tasks, strict=True):
        axis.set_ylim(-0.115, 0.57)
        axis.set_xlim(6.2, 2.85)
        axis.axhline(0, color=GREY, linewidth=0.8)
        ends = []
        for policy, style in zip(POLICIES, STYLES, strict=False):
            mine = [row for row in rows if (row["task"], row["policy"]) == (task, policy)]
            mine.sort(key=lambda row: -float(row["used"]))
            used = [float(row["used"]) for row in mine]
            rises = [float(row["rise"]) for row in mine]
            errors = [
                [float(row["rise"]) - float(row["rise_ci95_low"]) for row in mine],
                [float(row["rise_ci95_high"]) - float(row["rise"]) for row in mine],
            ]
            axis.plot([TOP_K, *used], [0, *rises], markersize=0, linewidth=1.6,
                      color=style["color"], linestyle=style["linestyle"])  # fmt: skip
            axis.errorbar(used, rises, yerr=errors, fmt=style["marker"], color=style["color"],
                          markersize=5, capsize=2.5, linewidth=1)  # fmt: skip
            ends.append((used[-1], rises[-1], policy, style["color"]))
        axis.plot(TOP_K, 0, "o", color=INK, markersize=6)
        shade_allowed(axis, ALLOWED, "5% or less")
        label_ends(axis, ends, gap=0.062)
        axis.set_title(task)
        axis.set_xlabel("experts per token and layer, used")
        axis.yaxis.set_major_formatter(lambda value, _: percent(round(value, 6)))
        axis.grid(axis="y", color="#e6e8eb", linewidth=0.7)
        axis.set_axisbelow(True)
    axes[0].annotate(
        "the router's\ntop-6", (TOP_K, 0), xytext=(6.1, 0.2), fontsize=8.5,
        arrowprops={"arrowstyle": "-", "color": GREY, "shrinkB": 4},
    )  # fmt: skip
    axes[0].set_ylabel("rise of perplexity over top-6")
    figure.supxlabel(
        "2026-11-24 and 2026-11-30, 2 x86-64 cores; lines are 95% intervals.",
        fontsize=8, color=GREY, x=0.99, ha="right",
    )  # fmt: skip
    save(figure, target)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
