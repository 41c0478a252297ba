"""`edgemoe sweep`: score against kept fraction, and the smallest model that holds."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import click

from edgemoe.api.sweep import sweep as run_sweep
from edgemoe.cli.options import (
    PATH,
    RAY,
    THREADS,
    command,
    force_option,
    options_of,
    output_option,
    report,
    reporting,
)
from edgemoe.tasks import split_task_arguments

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgemoe.sweep.outcome import Outcome

# Wide enough for the table where there is no terminal to ask.
_FILE_WIDTH = 160

option = options_of(run_sweep)


def split_numbers(kind: Callable[[str], Any]) -> Callable[..., tuple[Any, ...]]:
    """Return an option's callback that reads numbers with commas between them."""

    def read(_: click.Context, __: click.Parameter, value: str) -> tuple[Any, ...]:
        try:
            return tuple(kind(part) for part in value.split(","))
        except ValueError as error:
            raise click.BadParameter(
                f"must be numbers with commas between them, got {value!r}"
            ) from error

    return read


def split_names(_: click.Context, __: click.Parameter, value: str) -> tuple[str, ...]:
    """Split names with commas between them."""
    return tuple(name.strip() for name in value.split(","))


def parse_seeds(ctx: click.Context, option: click.Parameter, value: str) -> tuple[int, ...]:
    """Turn a count, or a list of seeds, into seeds."""
    seeds = split_numbers(int)(ctx, option, value)
    if "," in value:
        return seeds
    if seeds[0] < 1:
        raise click.BadParameter(f"must be one seed or more, got {value}")
    return tuple(range(seeds[0]))


@command(
    "edgemoe sweep demo/moe --task code=demo/tasks/code.train.jsonl --method reap,frequency"
    " -o report",
)
@click.argument("model", type=PATH)
@option(
    "--task",
    "tasks",
    multiple=True,
    metavar="NAME=FILE",
    help="Data of a task, JSON Lines: three quarters of the examples are calibrated on, every "
    "fourth is held out. Repeatable: each task gets plans of its own, which the others' "
    "held-out examples score too.",
)
@option(
    "--held-out",
    multiple=True,
    metavar="NAME=FILE",
    help="Held-out examples of a task; all examples of --task are calibrated on then. "
    "Repeatable.",
)
@option(
    "--method",
    "methods",
    multiple=True,
    metavar="M[,M]",
    help="Methods as of `edgemoe prune`. Repeatable.",
)
@option(
    "--set",
    "options",
    multiple=True,
    metavar="METHOD:NAME=VALUE",
    help="An option of a method, such as moe-i2:population=50. Repeatable.",
)
@option(
    "--recover",
    "recoveries",
    multiple=True,
    metavar="M[:NAME=VALUE,...]",
    help="Score every pruned model once more after a method of `edgemoe recover` on the "
    "examples that it was calibrated on, such as least-squares or router-kd:steps=50. "
    "Repeatable.",
)
@option(
    "--keep",
    "keeps",
    metavar="F[,F]",
    callback=split_numbers(float),
    help="Fractions of each layer's experts to keep, (0, 1]; those below what a token uses are "
    "left out.",
)
@option(
    "--layers",
    metavar="L[,L]",
    callback=split_names,
    help="uniform, owl or both, as of `edgemoe prune`: both sweep each method M and M+owl.",
)
@option(
    "--seeds",
    default="1",
    show_default=True,
    metavar="N|S,S",
    callback=parse_seeds,
    help="How many seeds, from 0 on, or which; only for methods that draw at random.",
)
@option(
    "--max-drop",
    type=float,
    metavar="D",
    help="Largest drop at the threshold, by the upper end of its 95% interval: 0.05 is 5% of "
    "perplexity or 5 points of accuracy.",
)
@option(
    "--accept-weak-evidence",
    is_flag=True,
    help="Name a threshold although fewer than 20 lines judge, or the model is not better than "
    "chance; the report says so.",
)
@option(
    "--accept-large-drop",
    is_flag=True,
    help="Take a --max-drop above 1 for perplexity: 2 is three times the perplexity.",
)
@option(
    "--calibration-tokens",
    type=click.IntRange(1),
    help="Tokens of each task to calibrate on.",
)
@option(
    "--held-out-tokens",
    type=click.IntRange(2),
    help="Tokens of each task to score.",
)
@option(
    "--workers",
    type=click.IntRange(1),
    metavar="N",
    help="Run N jobs at once, on processes of this machine or on the Ray cluster; each process "
    "loads the model.",
)
@option("--ray", **RAY)
@option("--threads", **THREADS)
@option(
    "--memory-limit",
    "memory_limit_gb",
    type=click.FloatRange(0),
    metavar="GB",
    help="Models in float32 that all processes together may load whole; a larger one is read "
    "layer by layer. Half of what is free without.",
)
@output_option("Report directory")
@force_option
@reporting
def sweep(
    as_json: bool, tasks: tuple[str, ...], held_out: tuple[str, ...], **given: Any
) -> None:
    """Score MODEL with fewer and fewer experts, and find the smallest model that holds.

    Every method makes a plan for every task at every fraction, and each is scored on examples
    that no calibration read. The report has a table (sweep.csv), a plot (sweep.png), the plans,
    and for each task the smallest model whose drop is, with 95% confidence, under --max-drop.
    When it is interrupted, the same command goes on from what is finished.
    """
    outcome = run_sweep(
        tasks=split_task_arguments(tasks), held_out=split_task_arguments(held_out), **given
    )
    from edgemoe.sweep.report import describe

    report({"output": given["output"], **describe(outcome)}, _text(outcome), as_json=as_json)


def _text(outcome: Outcome) -> str:
    import sys

    from rich.console import Console
    from rich.table import Table

    from edgemoe.sweep.report_text import list_columns, tell_threshold

    heading, lines = list_columns(outcome)
    table = Table(*heading, box=None, pad_edge=False)
    for line in lines:
        table.add_row(*line)
    written = io.StringIO()
    width = None if sys.stdout.isatty() else _FILE_WIDTH
    Console(file=written, width=width, highlight=False, markup=False).print(table)
    folder = outcome.request.output
    return "\n".join(
        [
            *(line.rstrip() for line in written.getvalue().splitlines()),
            "",
            *(tell_threshold(outcome, found, folder) for found in outcome.thresholds.values()),
            f"{folder}: report.md, report.json, sweep.csv, sweep.png and "
            f"{len({found.plan_file for found in outcome.findings})} plans",
            f"{folder} holds the text of the held-out and the calibration lines, readable for "
            "you alone: share report.md, report.json, sweep.csv and sweep.png.",
            *(f"note: {note}" for note in outcome.notes),
        ]
    )
