"""Calibrate in shards, one for each worker, to the same file that one process writes.

Every worker streams the checkpoint and reads its share of the lines; the shards' statistics
add up exactly (`edgemoe.calibrate.exact`). What workers have finished is beside the
output, so a worker that takes over from a dead one, and the command that takes over from an
interrupted one, go on from there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgemoe.calibrate.statistics import Statistics, merge
from edgemoe.calibrate.streamed import calibrate_streamed, calibration_key
from edgemoe.calibrate.windows import SEQUENCE_LENGTH, Windows, cut_tasks
from edgemoe.layerwise.finished_layers import layers_done
from edgemoe.models.checkpoint import Checkpoint
from edgemoe.models.device import device_here
from edgemoe.models.opening import open_streamed
from edgemoe.parallel.agreement import check_agreement, threads_of
from edgemoe.parallel.opening import open_workers
from edgemoe.parallel.workers import JobProgress
from edgemoe.resume import WorkDirectory, partial_path, resumable, wait_until_free
from edgemoe.versions import library_versions

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from edgemoe.parallel.workers import ExecutorConfig, Workers
    from edgemoe.tasks import TaskFile

_KEPT = "shards.json"
_SECONDS_TO_DIE = 30.0


@dataclass(frozen=True, kw_only=True)
class ShardJob:
    """One worker's share.

    Attributes:
        path: Checkpoint directory, absolute.
        tasks: All tasks, with their lines: workers need not see the files.
        output: The shard's statistics file, in a directory that exists.
        shard: `(index, of)`.
        max_tokens: As in `edgemoe.calibrate.collect.collect`.
        sequence_length: As there.
        device: As in `edgemoe.models.device.choose_device`.
        threads: CPU threads to compute with; None leaves what the worker has.
        versions: What the worker must have too, or its bits may differ.
    """

    path: Path
    tasks: Sequence[TaskFile]
    output: Path
    shard: tuple[int, int]
    max_tokens: int | None
    sequence_length: int
    device: str
    threads: int | None
    versions: dict[str, str]


def calibrate_in_shards(
    path: Path,
    tasks: Sequence[TaskFile],
    output: Path,
    executor: ExecutorConfig | Workers,
    *,
    max_tokens: int | None = None,
    sequence_length: int = SEQUENCE_LENGTH,
    device: str = "cpu",
    threads: int | None = None,
    texts: bool = True,
    force: bool = False,
) -> Statistics:
    """Measure tasks with several workers and write the statistics file.

    Args:
        path: Checkpoint directory, at the same place for all workers.
        tasks: What to measure it on.
        output: The statistics file; workers must see the directory that it is in.
        executor: Where the workers are, or workers that are open.
        max_tokens: As in `edgemoe.calibrate.collect.collect`.
        sequence_length: As there.
        device: As in `edgemoe.models.device.choose_device`; workers of one machine take
            turns at its GPUs.
        threads: CPU threads of each worker; by default as many as this process has, on a
            cluster those that Ray gives.
        texts: As in `edgemoe.calibrate.streamed.calibrate_streamed`.
        force: Whether `output`, and unfinished work of another call, may be replaced.

    Returns:
        The statistics; with as many threads on the same kind of machine they are, bit for bit,
        those of `edgemoe.calibrate.streamed.calibrate_streamed`.

    Raises:
        CheckpointError: The checkpoint is missing, unsafe or inconsistent.
        TaskFileError: No task has a token, or an argument is out of range.
        StreamingError: The family cannot be run layer by layer.
        SpreadError: There are no workers, they die, or do not see the same files.
        OutputError: The output exists, or the disk refuses.
    """
    path, output = path.resolve(), output.resolve()
    checkpoint = Checkpoint(path)
    streamed = open_streamed(checkpoint)
    windows = cut_tasks(
        streamed.moe,
        tasks,
        checkpoint.tokenizer,
        max_tokens=max_tokens,
        sequence_length=sequence_length,
    )
    with open_workers(executor) as workers:
        count = count_shards(windows, workers.count)
        options = [max_tokens, windows.sequence_length, device, threads, count]
        key = calibration_key("calibrate shards", checkpoint, tasks, options)
        with resumable(output, key, _KEPT, force=force) as work:
            outputs = [work.path / f"shard-{index:05}" for index in range(count)]
            jobs = [
                ShardJob(
                    path=path,
                    tasks=tasks,
                    output=file,
                    shard=(index, count),
                    max_tokens=max_tokens,
                    sequence_length=windows.sequence_length,
                    device=device,
                    threads=threads_of(workers.executor, threads),
                    versions=library_versions(),
                )
                for index, file in enumerate(outputs)
                if not file.exists()
            ]
            depth = max(layer.index for layer in streamed.moe.layers) + 1

            def count_layers() -> int:
                done = sum(
                    depth if file.exists() else layers_done(WorkDirectory(partial_path(file)))
                    for file in outputs
                )
                if done and work.read(_KEPT) is None:
                    work.write(_KEPT, {"shards": count})
                return done

            try:
                steps = JobProgress(depth * count, count_layers)
                workers.map(calibrate_shard, jobs, "calibrate", steps=steps)
            except BaseException:
                # What was finished since it last looked is worth keeping too.
                count_layers()
                raise
            statistics = merge(*map(Statistics.load, outputs))
            if not texts:
                statistics = statistics.without_tokens()
            statistics.save(output, force=force)
    return statistics


def calibrate_shard(job: ShardJob) -> None:
    """Do one worker's share, from where an earlier worker left it.

    Args:
        job: The share.

    Raises:
        SpreadError: This machine does not see the checkpoint or the output's directory, or has
            other versions.
    """
    import torch

    directories = {"checkpoint": job.path, "directory of -o": job.output.parent}
    check_agreement(directories, job.versions)
    if job.output.exists():
        return
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    wait_until_free(job.output, _SECONDS_TO_DIE)
    calibrate_streamed(
        job.path,
        job.tasks,
        job.output,
        max_tokens=job.max_tokens,
        sequence_length=job.sequence_length,
        shard=job.shard,
        device=device_here(job.device, job.shard[0]),
    )


def count_shards(windows: Windows, workers: int) -> int:
    """Say how many shards there can be without an empty one.

    Args:
        windows: What is to be read, as one shard.
        workers: The most shards, in [1, inf).

    Returns:
        The largest number that gives each shard a line.
    """
    lines = {window.line for found in windows.by_task.values() for window in found}
    return next(
        count
        for count in range(workers, 0, -1)
        if len({(line - 1) % count for line in lines}) == count
    )
