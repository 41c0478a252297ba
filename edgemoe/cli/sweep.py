"""``edgemoe sweep``: score against kept fraction, and the deepest cut that holds."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import click

from edgemoe.cli.extras import needs
from edgemoe.cli.options import PATH, force_option, output_option, report, reporting
from edgemoe.cli.workers import choose_place

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from edgemoe.sweep.outcome import Outcome

# Wide enough for the table where there is no terminal to ask.
_FILE_WIDTH = 160


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


@click.command()
@click.argument("model", type=PATH)
@click.option(
    "--task",
    "tasks",
    multiple=True,
    required=True,
    metavar="NAME=FILE",
    help="Three quarters of the lines choose the experts, every fourth judges. Repeatable: "
    "each task gets plans of its own, and judges those of the others too.",
)
@click.option(
    "--held-out",
    multiple=True,
    metavar="NAME=FILE",
    help="Lines to judge a task by; all lines of --task choose the experts then. Repeatable.",
)
@click.option(
    "--method",
    "methods",
    multiple=True,
    required=True,
    metavar="M[,M]",
    help="Methods as of `edgemoe prune`. Repeatable.",
)
@click.option(
    "--set",
    "options",
    multiple=True,
    metavar="METHOD:NAME=VALUE",
    help="An option of a method, such as moe-i2:population=50. Repeatable.",
)
@click.option(
    "--recover",
    "recoveries",
    multiple=True,
    metavar="M[:NAME=VALUE,...]",
    help="Judge every cut once more behind a method of `edgemoe recover`, on the lines that "
    "chose its experts, such as least-squares or router-kd:steps=50. Repeatable.",
)
@click.option(
    "--keep",
    "keeps",
    default="0.25,0.5,0.75,1.0",
    show_default=True,
    metavar="F[,F]",
    callback=split_numbers(float),
    help="Fractions of each layer's experts to keep, (0, 1]; those below what a token uses are "
    "left out.",
)
@click.option(
    "--layers",
    default="uniform",
    show_default=True,
    metavar="L[,L]",
    callback=split_names,
    help="uniform, owl or both, as of `edgemoe prune`: both sweep each method M and M+owl.",
)
@click.option(
    "--seeds",
    default="1",
    show_default=True,
    metavar="N|S,S",
    callback=parse_seeds,
    help="How many seeds, from 0 on, or which; only for methods that draw.",
)
@click.option(
    "--max-drop",
    type=float,
    default=0.02,
    show_default=True,
    metavar="D",
    help="Largest drop at the threshold: 0.05 is 5% of perplexity or 5 points of accuracy.",
)
@click.option("--calibration-tokens", type=click.IntRange(1), default=16_384, show_default=True)
@click.option("--held-out-tokens", type=click.IntRange(2), default=8_192, show_default=True)
@click.option(
    "--workers",
    type=click.IntRange(1),
    metavar="N",
    help="Run N jobs at once, on processes of this machine or on the Ray cluster; each process "
    "loads the model.",
)
@click.option(
    "--ray",
    "ray_address",
    metavar="ADDRESS",
    help="Put the workers on a Ray cluster: host:port, auto for the one this machine is in, "
    "local to start one here. One worker per machine unless --workers says otherwise.",
)
@click.option(
    "--threads",
    type=click.IntRange(1),
    metavar="N",
    help="CPU threads of each process; the last bits of the scores depend on it.",
)
@click.option(
    "--memory-limit",
    type=click.FloatRange(0),
    metavar="GB",
    help="Models in float32 that all processes together may load whole; a larger one is read "
    "layer by layer. Half of what is free without.",
)
@output_option("Report directory")
@force_option
@reporting
def sweep(
    model: Path,
    tasks: tuple[str, ...],
    held_out: tuple[str, ...],
    methods: tuple[str, ...],
    options: tuple[str, ...],
    recoveries: tuple[str, ...],
    keeps: tuple[float, ...],
    layers: tuple[str, ...],
    seeds: tuple[int, ...],
    max_drop: float,
    calibration_tokens: int,
    held_out_tokens: int,
    workers: int | None,
    ray_address: str | None,
    threads: int | None,
    memory_limit: float | None,
    output: Path,
    force: bool,
    as_json: bool,
) -> None:
    """Judge MODEL with fewer and fewer experts, and find the deepest cut that holds.

    Every method makes a plan for every task at every fraction, and each is scored on lines that
    no calibration read. The report has a table (sweep.csv), a plot (sweep.png), the plans, and
    for each task the deepest cut whose loss is, with 95% confidence, under --max-drop. When it
    is interrupted, the same command goes on from what is finished.
    """
    needs("export", "sweep", *(["ray"] if ray_address is not None else []))
    from edgemoe.sweep.recoveries import read_recoveries
    from edgemoe.sweep.report import describe
    from edgemoe.sweep.request import SweepRequest, read_methods, read_paths
    from edgemoe.sweep.sweep import run_sweep

    request = SweepRequest(
        model=model,
        output=output,
        tasks=read_paths(tasks),
        methods=read_methods(methods, options, layers),
        recoveries=read_recoveries(recoveries),
        held_out=read_paths(held_out),
        keeps=keeps,
        seeds=seeds,
        max_drop=max_drop,
        calibration_tokens=calibration_tokens,
        held_out_tokens=held_out_tokens,
        threads=threads,
        memory_limit_bytes=None if memory_limit is None else int(memory_limit * 1e9),
        force=force,
    )
    outcome = run_sweep(request, choose_place(workers, ray_address))
    report({"output": output, **describe(outcome)}, _text(outcome), as_json=as_json)


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
            *(f"note: {note}" for note in outcome.notes),
        ]
    )
