"""`edgemoe merge-stats`: statistics of several shards to one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from edgemoe.api.merge_statistics import merge_statistics
from edgemoe.cli.options import (
    PATH,
    command,
    force_option,
    output_option,
    report,
    reporting,
)

if TYPE_CHECKING:
    from pathlib import Path


@command(
    "edgemoe merge-stats first.stats second.stats -o both.stats",
    name="merge-stats",
)
@click.argument("first", type=PATH, metavar="STATS")
@click.argument("others", type=PATH, nargs=-1, required=True, metavar="STATS...")
@output_option("Statistics file")
@force_option
@reporting
def merge_stats(
    first: Path, others: tuple[Path, ...], output: Path, force: bool, as_json: bool
) -> None:
    """Add statistics of one checkpoint up: tasks unite, sums of one task add.

    The shards of one calibration add up to the file that it would have written unsharded, bit
    for bit.
    """
    merged = merge_statistics([first, *others], output, force=force)
    tokens = {name: task.tokens for name, task in merged.tasks.items()}
    counted = ", ".join(f"{name} {count} tokens" for name, count in tokens.items())
    partial = {
        name: [f"{source.shard[0]}/{source.shard[1]}" for source in task.sources]
        for name, task in merged.tasks.items()
        if any(source.shard != (0, 1) for source in task.sources)
    }
    missing = "".join(f"; of {name} only {', '.join(p)}" for name, p in partial.items())
    report(
        {"output": output, "sha256": merged.sha256, "tokens": tokens, "partial": partial},
        f"{output}: {1 + len(others)} files merged, {counted}{missing}",
        as_json=as_json,
    )
