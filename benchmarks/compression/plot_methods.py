r"""All methods of one or more sweeps in one picture: the rise at each cut, task by task.

The plot that a sweep writes has a band for each of its series, which a dozen methods would
bury; here are the means alone, before a recovery above and after it below::

    python -m benchmarks.compression.plot_methods \
        benchmarks/compression/results/2026-11-23-methods.csv --plot docs/images/methods.png
"""

from __future__ import annotations

from pathlib import Path

import click
import matplotlib as mpl

from benchmarks.compression.condense import Row, read

mpl.use("agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter

_MARKERS = "os^vDPX*<>hd"


@click.command()
@click.argument(
    "tables",
    metavar="SWEEP.CSV...",
    nargs=-1,
    required=True,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
)
@click.option("--plot", type=click.Path(path_type=Path), required=True)
def main(tables: tuple[Path, ...], plot: Path) -> None:
    """Draw the rows of reports."""
    own = [row for row in read(tables) if row["task"] and row["task"] == row["judged_on"]]
    tasks = list(dict.fromkeys(row["task"] for row in own))
    recoveries = list(dict.fromkeys(row["recovery"] for row in own))
    methods = list(dict.fromkeys(row["method"] for row in own))
    figure, panels = plt.subplots(
        len(recoveries),
        len(tasks),
        figsize=(4.2 * len(tasks), 3.6 * len(recoveries)),
        squeeze=False,
        sharey="row",
        layout="constrained",
    )
    for recovery, line in zip(recoveries, panels, strict=True):
        for task, panel in zip(tasks, line, strict=True):
            for number, method in enumerate(methods):
                chosen = (task, method, recovery)
                rows = [
                    row
                    for row in own
                    if (row["task"], row["method"], row["recovery"]) == chosen
                ]
                panel.plot(
                    *_means(rows),
                    marker=_MARKERS[number % len(_MARKERS)],
                    markersize=4,
                    linewidth=1,
                    color=plt.get_cmap("tab20")(number / 20),
                    label=method,
                )
            panel.set_title(f"{task}, {f'then {recovery}' if recovery else 'pruned alone'}")
            panel.set_yscale("log")
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_minor_formatter(NullFormatter())
            panel.yaxis.set_major_formatter(lambda value, _: f"+{100 * value:g}%")
            panel.set_xticks(sorted({float(row["keep"]) for row in own}))
            panel.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
            panel.grid(alpha=0.25)
        line[0].set_ylabel("rise of perplexity")
    for panel in panels[-1]:
        panel.set_xlabel("routed experts' parameters kept")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center")
    figure.savefig(plot, dpi=110)


def _series(row: Row) -> tuple[str, str, str]:
    return row["task"], row["method"], row["recovery"]


def _means(rows: list[Row]) -> tuple[list[float], list[float]]:
    """Return the cuts, and the mean rise of the seeds at each."""
    keeps = sorted({float(row["keep"]) for row in rows})
    rises = [
        [float(row["drop"]) for row in rows if float(row["keep"]) == keep] for keep in keeps
    ]
    return keeps, [sum(found) / len(found) for found in rises]


if __name__ == "__main__":
    main()
