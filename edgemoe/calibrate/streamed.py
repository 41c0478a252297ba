"""Measure a checkpoint that is larger than memory, and go on after an interruption."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from edgemoe.calibrate.collect import measure
from edgemoe.calibrate.windows import SEQUENCE_LENGTH, cut_tasks
from edgemoe.layerwise.outputs import DEFAULT_LIMIT_BYTES
from edgemoe.layerwise.provider import StreamedLayers
from edgemoe.models.checkpoint import Checkpoint
from edgemoe.models.opening import open_streamed
from edgemoe.resume import resumable, resume_key

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from edgemoe.calibrate.statistics import Statistics
    from edgemoe.tasks import TaskFile

_PROGRESS = "*progress.json"


def calibrate_streamed(
    path: Path | Checkpoint,
    tasks: Sequence[TaskFile],
    output: Path,
    *,
    max_tokens: int | None = None,
    sequence_length: int = SEQUENCE_LENGTH,
    shard: tuple[int, int] = (0, 1),
    limit_bytes: int = DEFAULT_LIMIT_BYTES,
    device: str = "cpu",
    texts: bool = True,
    force: bool = False,
) -> Statistics:
    """Measure tasks and write the statistics file.

    What each finished layer gave is kept in `<output>.partial` until the file is written; the
    same call goes on from there after an interruption.

    Args:
        path: The checkpoint.
        tasks: What to measure it on.
        output: The statistics file.
        max_tokens: As in `edgemoe.calibrate.collect.collect`.
        sequence_length: As there.
        shard: As there.
        limit_bytes: Memory for what layers returned; the rest is read from files.
        device: Where layers compute, such as `cuda:0`.
        texts: Whether the tokens that were read are kept in the file.
        force: Whether `output`, and unfinished work of another call, may be replaced.

    Returns:
        The statistics.

    Raises:
        CheckpointError: The checkpoint is missing, unsafe or inconsistent.
        TaskFileError: No task has a token in this shard, or an argument is out of range.
        StreamingError: The family cannot be run layer by layer.
        OutputError: The output exists, or the disk refuses.
    """
    checkpoint = Checkpoint.open(path)
    streamed = open_streamed(checkpoint, device=device)
    windows = cut_tasks(
        streamed.moe,
        tasks,
        checkpoint.tokenizer,
        max_tokens=max_tokens,
        sequence_length=sequence_length,
        shard=shard,
    )
    options = [max_tokens, windows.sequence_length, list(shard), torch.device(device).type]
    key = calibration_key("calibrate", checkpoint, tasks, options)
    with resumable(output, key, _PROGRESS, force=force) as work:
        checkpoint.hashes.remember(work)
        layers = StreamedLayers(streamed, checkpoint.hashes)
        statistics = measure(layers, tasks, windows, work, limit_bytes)
        if not texts:
            statistics = statistics.without_tokens()
        statistics.save(output, force=force)
    return statistics


def calibration_key(
    command: str, checkpoint: Checkpoint, tasks: Sequence[TaskFile], options: Sequence[Any]
) -> dict[str, Any]:
    """Name all that decides the result of a calibration.

    Args:
        command: What calibrates.
        checkpoint: The checkpoint.
        tasks: The tasks.
        options: JSON values.

    Returns:
        JSON values, for `edgemoe.resume.resumable`.
    """
    return resume_key(
        command,
        checkpoint,
        tasks={task.name: task for task in tasks},
        options=options,
        tokenizer=checkpoint.tokenizer_sha256,
    )
