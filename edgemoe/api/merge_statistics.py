"""Add statistics up."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edgemoe.api.arguments import as_path
from edgemoe.api.checks import check_output
from edgemoe.api.running import running
from edgemoe.errors import ArgumentError
from edgemoe.staging import reserved

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgemoe.api.arguments import StrPath
    from edgemoe.calibrate.statistics import Statistics


def merge_statistics(
    statistics: Sequence[Statistics | StrPath],
    output: StrPath | None = None,
    *,
    force: bool = False,
) -> Statistics:
    """Add statistics of one checkpoint up: tasks unite, sums of one task add.

    Shards of one calibration add up to the statistics that one call would have measured, bit
    for bit. With `output` the file is written; without it nothing is.

    Args:
        statistics: Two or more, or their files, in any order.
        output: Statistics file to write; None writes none.
        force: Whether `output` may be replaced.

    Returns:
        The statistics over all the data: float64 sums [experts] by task and MoE layer.

    Raises:
        ArgumentError: There are none.
        StatisticsError: A file is malformed, two measure different checkpoints, or the same
            examples of a file are counted twice.
        OutputError: `output` exists and `force` is false, or cannot be written.
        MissingDependencyError: The extra `export` is not installed.

    Example:
        >>> from edgemoe import calibrate
        >>> from edgemoe.api.merge_statistics import merge_statistics
        >>> halves = [calibrate("moe", {"code": "code.jsonl"}, shard=(i, 2)) for i in range(2)]
        >>> whole = merge_statistics(halves)
    """
    target = as_path(output)
    check_output(target, force=force, directory=False)
    with (
        running("export"),
        reserved(target, force=force, directory=False),
    ):
        from edgemoe.calibrate.statistics import Statistics, merge

        if not statistics:
            raise ArgumentError("there must be statistics to add up, got none.")
        merged = merge(
            *(
                one if isinstance(one, Statistics) else Statistics.load(Path(one))
                for one in statistics
            )
        )
        if target is not None:
            merged.save(target, force=force)
    return merged
