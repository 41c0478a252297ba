"""`edgemoe calibrate`: checkpoint and task files to statistics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from edgemoe.api.calibrate import calibrate as measure
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
    from edgemoe.calibrate.statistics import Statistics

option = options_of(measure)


def parse_shard(_: click.Context, __: click.Parameter, value: str) -> tuple[int, int]:
    """Turn `INDEX/OF` into two integers."""
    index, _slash, count = value.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise click.BadParameter(
            f"must be INDEX/OF with INDEX < OF, such as 0/2, got {value!r}"
        )
    return int(index), int(count)


@command(
    "edgemoe calibrate demo/moe --task code=demo/tasks/code.train.jsonl -o code.stats",
)
@click.argument("model", type=PATH)
@option(
    "--task",
    "tasks",
    multiple=True,
    metavar="NAME=FILE",
    help="Calibration data of a task, JSON Lines. Repeatable.",
)
@output_option("Statistics file")
@option(
    "--max-tokens",
    type=click.IntRange(1),
    help="Tokens of each task to read, from its first example on; all without.",
)
@option(
    "--shard",
    metavar="INDEX/OF",
    default="0/1",
    callback=parse_shard,
    help="Read every OF-th example from INDEX on; merge-stats adds the shards up.",
)
@option(
    "--workers",
    type=click.IntRange(1),
    metavar="N",
    help="Read N shards at once, on processes of this machine or on the Ray cluster.",
)
@option("--ray", **RAY)
@option("--threads", **THREADS)
@option(
    "--device",
    metavar="cpu|cuda|cuda:N|auto",
    help="Where layers compute; with several GPUs, workers take turns at them.",
)
@option(
    "--no-texts",
    "texts",
    is_flag=True,
    flag_value=False,
    help="Leave out the tokens that were read: nobody can read the text in the file then, and "
    "methods that run layers (moe-i2, naee, ream, camera, heapr, svd-whitened) refuse it.",
)
@force_option
@reporting
def calibrate(as_json: bool, tasks: tuple[str, ...], **given: Any) -> None:
    """Measure the routing of MODEL on calibration data of tasks.

    The statistics hold, for each task, layer and expert, how often it is chosen, its router
    weights and the norm of its output: what `edgemoe prune` and `edgemoe decompose` read. One
    decoder layer is in memory at a time. When it is interrupted, the same command goes on from
    the last finished layer. Several workers write the same file as one.
    """
    statistics = measure(tasks=split_task_arguments(tasks), **given)
    tokens = {name: task.tokens for name, task in statistics.tasks.items()}
    counted = ", ".join(f"{name} {count} tokens" for name, count in tokens.items())
    layers = len(statistics.shape.layers)
    report(
        {
            "output": given["output"],
            "checkpoint_sha256": statistics.checkpoint_sha256,
            "sha256": statistics.sha256,
            "moe_layers": layers,
            "tokens": tokens,
            "holds_texts": statistics.has_tokens,
        },
        f"{given['output']}: {layers} MoE layers over {counted}{_holds(statistics)}",
        as_json=as_json,
    )


def _holds(statistics: Statistics) -> str:
    """Say whose text can be read in the file."""
    if not statistics.has_tokens:
        return ". It holds no text."
    return (
        ". It holds the text of these tokens, readable for you alone: treat it like the task "
        "files, or calibrate with --no-texts."
    )
