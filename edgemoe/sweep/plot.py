"""The plot of a sweep: drop against the fraction of routed experts that is kept."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from edgemoe.errors import MissingDependencyError
from edgemoe.evaluate.drop import Drop

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes

    from edgemoe.sweep.outcome import Outcome, Row

_COLUMNS = 2
_PANEL_INCHES = (6.4, 4.4)
_DPI = 120
# Okabe and Ito's colours, told apart by colour-blind readers (https://jfly.uni-koeln.de/color/),
# with yellow last.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_MARKERS = "osD^vPX*"
_DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)))
_THRESHOLD_COLOUR = "#808080"
_BAR_SHIFT = 0.004  # of the experts' parameters
# Drops of perplexity that a reader looks for, on a scale of ratios.
_TICKS = (-0.5, -0.2, -0.1, -0.05, -0.02, -0.01, 0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7)
_TICKS_ABOVE = (1, 2, 5, 10, 20, 50, 100, 1000, 10_000)
_CLOSEST_TICKS = 0.045  # of the axis


def write_plot(outcome: Outcome, path: Path) -> None:
    """Draw a panel per task and a line per method and recovery, with bars of 95% intervals.

    Args:
        outcome: What was found.
        path: The PNG file.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "the plot of a sweep needs the extra 'sweep': matplotlib is not installed. "
            "Run: pip install 'edgemoe[sweep]'"
        ) from error
    tasks = list(outcome.request.tasks)
    columns = min(_COLUMNS, len(tasks))
    lines = math.ceil(len(tasks) / columns)
    size = (_PANEL_INCHES[0] * columns, _PANEL_INCHES[1] * lines)
    figure = Figure(figsize=size, dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(lines, columns, squeeze=False)
    for panel, task in zip(panels.flat, tasks, strict=False):
        _draw_task(panel, outcome, task)
    for panel in panels.flat[len(tasks) :]:
        panel.set_axis_off()
    figure.savefig(path)


def _draw_task(panel: Axes, outcome: Outcome, task: str) -> None:
    rows = [row for row in outcome.own_rows if row.task == task]
    before = outcome.unpruned.scores[task]
    relative = before.metric == "perplexity"
    for number, method in enumerate(outcome.request.methods):
        for way, recovery in enumerate((None, *outcome.request.recoveries)):
            mine = [row for row in rows if (row.method, row.recovery) == (method, recovery)]
            _draw_series(panel, mine, number, way, relative=relative)
    limit = outcome.request.max_drop
    panel.axhline(
        _height(limit, relative=relative),
        color=_THRESHOLD_COLOUR,
        linestyle="-.",
        linewidth=1.2,
        label=f"--max-drop {limit:g}",
    )
    panel.axhline(_height(0, relative=relative), color=_THRESHOLD_COLOUR, linewidth=0.8)
    panel.set_title(f"{task}: {before.metric} {before.value:.4g} unpruned, {before.n} lines")
    panel.set_xlabel("routed experts' parameters kept")
    panel.set_ylabel(
        "rise of perplexity" if relative else "fall of accuracy, percentage points"
    )
    panel.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
    panel.set_xticks(sorted({round(row.kept_fraction, 3) for row in rows} | {1.0}))
    if relative:
        _label_ratios(panel)
    else:
        panel.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}")
    panel.grid(alpha=0.25)
    panel.legend(fontsize="small")


def _draw_series(
    panel: Axes, rows: list[Row], number: int, way: int, *, relative: bool
) -> None:
    """Draw a method in its colour, a recovery in dashes: mean and interval of its seeds."""
    drops = [(row.kept_fraction, row.drop) for row in rows]
    if not way and all(fraction < 1 for fraction, _ in drops):
        # Where a method cuts nothing it costs nothing.
        drops.append((1.0, Drop(0.0, (0.0, 0.0))))
    fractions = sorted({fraction for fraction, _ in drops})
    groups = [[drop for fraction, drop in drops if fraction == f] for f in fractions]
    colour = _COLOURS[number % len(_COLOURS)]
    marker = _MARKERS[number % len(_MARKERS)]
    means = [sum(drop.value for drop in group) / len(group) for group in groups]
    lows = [min(drop.ci95[0] for drop in group) for group in groups]
    highs = [max(drop.ci95[1] for drop in group) for group in groups]
    mean, low, high = (
        [_height(value, relative=relative) for value in curve] for curve in (means, lows, highs)
    )
    # Bars beside each other, not bands over each other: every end can be read. No error bars
    # of matplotlib, which refuse an interval that does not hold its value, as bootstraps may.
    shift = _BAR_SHIFT * (number - 1.5 + way / 2)
    beside = [fraction + shift * (fraction < 1) for fraction in fractions]
    panel.vlines(beside, low, high, color=colour, linewidth=1)
    panel.plot(beside * 2, low + high, color=colour, marker="_", markersize=5, linestyle="none")
    panel.plot(
        beside,
        mean,
        color=colour,
        marker=marker,
        markersize=5,
        # A recovery is told by its marker as well, where dashes are too short to be seen.
        markerfacecolor=colour if way == 0 else "white",
        linestyle=_DASHES[way % len(_DASHES)],
        label=rows[0].series,
    )
    if len(drops) > len(fractions):
        panel.plot(
            [fraction for fraction, _ in drops],
            [_height(drop.value, relative=relative) for _, drop in drops],
            color=colour,
            marker=".",
            linestyle="none",
            markersize=4,
        )


def _height(drop: float, *, relative: bool) -> float:
    """Return where a drop is drawn: a rise of perplexity by the logarithm of the ratio."""
    return math.log(1 + drop) if relative else drop


def _label_ratios(panel: Axes) -> None:
    """Put ticks at round rises, as many as there is room for."""
    low, high = panel.get_ylim()
    inside = [
        (math.log(1 + tick), tick)
        for tick in (*_TICKS, *_TICKS_ABOVE)
        if low <= math.log(1 + tick) <= high
    ]
    chosen: list[tuple[float, float]] = []
    # The round ones first: no change, then from the largest change down.
    for height, tick in sorted(inside, key=lambda found: (found[1] != 0, -abs(found[0]))):
        if all(abs(height - other) > _CLOSEST_TICKS * (high - low) for other, _ in chosen):
            chosen.append((height, tick))
    panel.set_yticks(
        [height for height, _ in chosen],
        [f"{100 * tick:+g}%" if tick else "0" for _, tick in chosen],
    )
    panel.set_ylim(low, high)
