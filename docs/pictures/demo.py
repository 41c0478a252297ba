"""Size, perplexity and decoding speed of the demo's models, in bars.

python docs/pictures/demo.py benchmarks/results/2026-12-01-demo.json docs/images/demo.svg
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
from plots import BLUE, GREY, VERMILION, save

COLOURS = (GREY, "#9aa5b1", BLUE, VERMILION)


def main(source: Path, target: Path) -> None:
    """Draw a panel each for size, both tasks' perplexity, and speed."""
    found = json.loads(source.read_text(encoding="utf-8"))
    rows = found["rows"]
    names = [row["model"].replace(", ", "\n") for row in rows]
    panels = (
        ("size, MB", "less is better", "{:.1f}", [row["megabytes"] for row in rows], None),
        *(
            (
                f"perplexity, {task}",
                "less is better",
                "{:.2f}",
                [row["perplexity"][task]["value"] for row in rows],
                [row["perplexity"][task]["ci95"] for row in rows],
            )
            for task in ("code", "bible")
        ),
        (
            "decoding, tokens/s",
            "more is better",
            "{:.0f}",
            [row["decode_tokens_per_s"] for row in rows],
            None,
        ),
    )
    figure, axes = plt.subplots(1, 4, figsize=(11.5, 3.2), sharey=True, layout="constrained")
    for axis, (title, better, form, values, intervals) in zip(axes, panels, strict=True):
        places = range(len(values))[::-1]
        axis.barh(places, values, color=COLOURS, height=0.66)
        ends = values
        if intervals:
            low = [value - low for value, (low, _) in zip(values, intervals, strict=True)]
            high = [high - value for value, (_, high) in zip(values, intervals, strict=True)]
            axis.errorbar(
                values, list(places), xerr=[low, high], fmt="none", ecolor="#1b1f24",
                capsize=3, linewidth=1,
            )  # fmt: skip
            ends = [high for _, high in intervals]
        for place, value, end in zip(places, values, ends, strict=True):
            axis.text(
                end + 0.03 * max(ends), place, form.format(value), va="center", fontsize=9
            )
        axis.set_xlim(0, 1.22 * max(ends))
        axis.set_title(title)
        axis.set_xlabel(better, fontsize=8.5, color=GREY)
        axis.spines["left"].set_visible(False)
        axis.tick_params(axis="y", length=0)
    axes[0].set_yticks(range(len(names))[::-1], names, fontsize=9)
    figure.supxlabel(
        f"{found['measured']}, {found['machine']}; lines are 95% intervals",
        fontsize=8,
        color=GREY,
        x=0.99,
        ha="right",
    )
    save(figure, target)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
