"""How all plots look: few curves, direct labels, colours that differ in print, too."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib as mpl

mpl.use("agg")
import matplotlib.pyplot as plt

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours (https://jfly.uni-koeln.de/color/), each with a marker and a dash of
# its own, so that a series is known without its colour.
BLUE, VERMILION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#AA4499"
INK, GREY, LIGHT = "#1b1f24", "#6e7781", "#d0d7de"
STYLES = (
    {"color": BLUE, "marker": "o", "linestyle": "-"},
    {"color": VERMILION, "marker": "s", "linestyle": (0, (5, 1.5))},
    {"color": GREEN, "marker": "^", "linestyle": (0, (1, 1))},
    {"color": PURPLE, "marker": "D", "linestyle": (0, (5, 1.5, 1, 1.5))},
    {"color": INK, "marker": "x", "linestyle": (0, (2, 2))},
)
ALLOWED = "#ddf4e4"  # behind what is allowed

plt.rcParams.update(
    {
        "font.family": "DejaVu Sans",
        "font.size": 10,
        "axes.edgecolor": GREY,
        "axes.labelcolor": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        # A margin, since the card ends where the page may be dark.
        "figure.constrained_layout.w_pad": 0.12,
        "figure.constrained_layout.h_pad": 0.1,
        "svg.fonttype": "path",
        # The same drawing has the same bytes.
        "svg.hashsalt": "edgemoe",
    }
)


def percent(value: float) -> str:
    """Return a change as people read it, such as `+5%`."""
    return f"{100 * value:+g}%" if value else "0"


def shade_allowed(axis: Axes, limit: float, text: str) -> None:
    """Shade what a limit allows, and say so in its lower right corner.

    Args:
        axis: Where, its limits set already.
        limit: Largest rise that is allowed.
        text: What to write; nothing where it is empty.
    """
    axis.axhspan(axis.get_ylim()[0], limit, color=ALLOWED, zorder=0, linewidth=0)
    axis.axhline(limit, color=GREEN, linewidth=0.9, zorder=0.5)
    axis.text(
        0.98, 0.02, text, transform=axis.transAxes, color="#1a7f37", fontsize=8.5, ha="right"
    )


def label_ends(
    axis: Axes, ends: list[tuple[float, float, str, str]], *, gap: float, log: bool = False
) -> None:
    """Write each curve's name beside its end, moved apart where they would overlap.

    Args:
        axis: Where.
        ends: x and y of each end, the name and the colour.
        gap: Least distance of two names, as a share of the axis's height.
        log: Whether the axis is logarithmic.
    """
    import math

    low, high = axis.get_ylim()
    as_share = (lambda y: math.log(y / low) / math.log(high / low)) if log else (
        lambda y: (y - low) / (high - low)
    )  # fmt: skip
    ordered = sorted(ends, key=lambda end: end[1])
    heights: list[float] = []
    for _, y, _, _ in ordered:
        share = as_share(y)
        heights.append(max(share, heights[-1] + gap) if heights else share)
    # What was pushed up is brought down again by half, so that names stay near their curves.
    over = max(0.0, heights[-1] - 1)
    for (x, y, name, colour), height in zip(ordered, heights, strict=True):
        at = height - over
        place = low * (high / low) ** at if log else low + at * (high - low)
        axis.annotate(
            name,
            (x, y),
            xytext=(axis.get_xlim()[1], place),
            textcoords="data",
            color=colour,
            fontsize=9,
            va="center",
            ha="left",
            annotation_clip=False,
        )


def save(figure: Figure, path: Path) -> None:
    """Write a figure on its light card."""
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=130)
    plt.close(figure)
