"""``edgemoe calibrate``: checkpoint and task files to statistics."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from edgemoe.cli.extras import needs
from edgemoe.cli.options import PATH, force_option, output_option, report, reporting

if TYPE_CHECKING:
    from pathlib import Path


def parse_shard(_: click.Context, __: click.Parameter, value: str | None) -> tuple[int, int]:
    """Turn ``INDEX/OF`` into two integers."""
    if value is None:
        return (0, 1)
    index, _slash, count = value.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise click.BadParameter(
            f"must be INDEX/OF with INDEX < OF, such as 0/2, got {value!r}"
        )
    return int(index), int(count)


@click.command()
@click.argument("model", type=PATH)
@click.option(
    "--task", "tasks", multiple=True, required=True, metavar="NAME=FILE", help="Repeatable."
)
@output_option("Statistics file")
@click.option("--max-tokens", type=click.IntRange(1), help="Read so many tokens per task.")
@click.option(
    "--shard",
    metavar="INDEX/OF",
    callback=parse_shard,
    help="Read every OF-th line from INDEX on; merge-stats adds the shards up.",
)
@force_option
@reporting
def calibrate(
    model: Path,
    tasks: tuple[str, ...],
    output: Path,
    max_tokens: int | None,
    shard: tuple[int, int],
    force: bool,
    as_json: bool,
) -> None:
    """Measure which experts of MODEL the tasks use.

    One decoder layer is in memory at a time. When it is interrupted, the same command goes on
    from the last finished layer.
    """
    needs("export")
    from edgemoe.calibrate.collect import collect
    from edgemoe.calibrate.streamed import calibrate_streamed
    from edgemoe.errors import StreamingError
    from edgemoe.models import load_model, load_tokenizer
    from edgemoe.staging import refuse_existing
    from edgemoe.tasks import load_tasks

    refuse_existing(output, force=force, directory=False)
    task_files = load_tasks(tasks)
    try:
        statistics = calibrate_streamed(
            model, task_files, output, max_tokens=max_tokens, shard=shard, force=force
        )
    except StreamingError as error:
        click.echo(f"{error} The whole model is loaded instead.", err=True)
        statistics = collect(
            load_model(model),
            task_files,
            load_tokenizer(model),
            max_tokens=max_tokens,
            shard=shard,
        )
        statistics.save(output, force=force)
    tokens = {name: task.tokens for name, task in statistics.tasks.items()}
    counted = ", ".join(f"{name} {count} tokens" for name, count in tokens.items())
    report(
        {
            "output": output,
            "checkpoint_sha256": statistics.checkpoint_sha256,
            "sha256": statistics.sha256,
            "moe_layers": len(statistics.shape.layers),
            "tokens": tokens,
        },
        f"{output}: {len(statistics.shape.layers)} MoE layers over {counted}",
        as_json=as_json,
    )
