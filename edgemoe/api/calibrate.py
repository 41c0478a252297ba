"""Measure which experts tasks use."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from edgemoe.api.arguments import as_path, check_at_least_one, read_tasks, task_paths
from edgemoe.api.checks import check_checkpoint, check_output
from edgemoe.api.extras import needs
from edgemoe.api.running import running
from edgemoe.api.workers import choose_executor, extras_of
from edgemoe.errors import ArgumentError
from edgemoe.models.device import check_device
from edgemoe.staging import reserved

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from edgemoe.api.arguments import StrPath, Tasks
    from edgemoe.calibrate.statistics import Statistics
    from edgemoe.parallel.workers import ExecutorConfig
    from edgemoe.progress import OnProgress
    from edgemoe.tasks import TaskFile

_LOG = logging.getLogger(__name__)


def calibrate(
    model: StrPath,
    tasks: Tasks,
    output: StrPath | None = None,
    *,
    max_tokens: int | None = None,
    shard: tuple[int, int] = (0, 1),
    workers: int | None = None,
    ray: str | None = None,
    threads: int | None = None,
    device: str = "cpu",
    texts: bool = True,
    force: bool = False,
    on_progress: OnProgress | None = None,
) -> Statistics:
    """Measure which experts of a checkpoint tasks use, and how much these add to the output.

    One decoder layer is in memory at a time. With `output`, the statistics file is written, and
    `<output>.partial` keeps what finished layers gave: after an interruption the same call goes
    on from there. Without it nothing is left on disk. Where the layers of a family cannot be
    read one by one the model is loaded whole; the logger `edgemoe.api` says so at level INFO.

    Args:
        model: Checkpoint directory.
        tasks: Task files (JSON Lines) by name, or tasks that are loaded.
        output: Statistics file to write; None writes none.
        max_tokens: Tokens of each task to read, from its first example on, in [1, inf); None
            reads all.
        shard: `(index, of)`: read every `of`-th example from `index` on, with index in
            [0, of). `edgemoe.api.merge_statistics.merge_statistics` adds shards up.
        workers: Read so many shards at once, in [1, inf), on processes of this machine or on
            the Ray cluster; the statistics are those of one process.
        ray: Put the workers on a Ray cluster: `host:port`, `auto` for the one that this
            machine is in, `local` to start one. One worker a machine unless `workers` is given.
        threads: CPU threads of each process, in [1, inf); None leaves what they are. The last
            bits of the sums depend on it.
        device: Where layers compute: `cpu`, `cuda`, `cuda:N` or `auto`.
        texts: Keep the tokens that were read, four bytes each: methods that run layers (moe-i2,
            naee, ream, camera, heapr, svd-whitened) read them again. Whoever has the file can
            read the text then; it is made readable for its owner only.
        force: Whether `output`, and unfinished work of another call, may be replaced.
        on_progress: Called with each `edgemoe.progress.ProgressEvent`; None draws a bar
            where stderr is a terminal.

    Returns:
        For each task and MoE layer float64 sums over its tokens: [experts] how often an expert
        is chosen, its router weights and output norms; [experts, experts] products of router
        logits and how often two are chosen together. And, with `texts`, the tokens.

    Raises:
        ArgumentError: `shard` is given together with `workers` or `ray`, `ray` without
            `output`, or a count is out of range.
        CheckpointError: The checkpoint is missing, unsafe or inconsistent.
        FamilyError: The family is not supported.
        TaskFileError: A task file breaks the format, or no task has a token in the shard.
        SpreadError: Workers cannot be reached, or die.
        OutputError: `output` exists and `force` is false, or the disk refuses.
        EdgemoeError: There is no such device.
        MissingDependencyError: The extra `export`, or `ray`, is not installed.

    Example:
        >>> from edgemoe import calibrate
        >>> statistics = calibrate("moe", {"code": "code.jsonl"}, "code.stats")
        >>> tokens = statistics.task("code").tokens
    """
    spread = workers is not None or ray is not None
    if spread and tuple(shard) != (0, 1):
        raise ArgumentError("--shard cannot be used with --workers or --ray.")
    if ray is not None and output is None:
        raise ArgumentError("--ray needs an output, which is where workers leave their shards.")
    check_at_least_one(max_tokens=max_tokens, workers=workers, threads=threads)
    check_device(device)
    path, target = Path(model), as_path(output)
    extras = ("export", *extras_of(ray))
    needs(*extras)
    inputs = (path, *task_paths(tasks).values())
    check_output(target, *inputs, force=force, directory=False)
    check_checkpoint(path)
    loaded = read_tasks(tasks, path)
    with (
        running(*extras, threads=threads, on_progress=on_progress),
        _file(target) as file,
        reserved(file, force=force, directory=False, resumes=True),
    ):
        from edgemoe.models.device import device_here

        executor = None
        if spread:
            if ray is None:
                device_here(device)  # refused now, not in a worker
            executor = choose_executor(
                workers, ray, gpus=None if device == "auto" else device != "cpu"
            )
        return _measure(
            path,
            loaded,
            file,
            executor,
            max_tokens=max_tokens,
            shard=shard,
            threads=threads,
            device=device,
            texts=texts,
            force=force,
        )


@contextlib.contextmanager
def _file(output: Path | None) -> Iterator[Path]:
    """Yield where the statistics go: layers leave theirs beside it also where none is kept."""
    if output is not None:
        yield output
        return
    with tempfile.TemporaryDirectory(prefix="edgemoe-calibrate-") as folder:
        yield Path(folder) / "statistics"


def _measure(
    model: Path,
    tasks: Sequence[TaskFile],
    output: Path,
    executor: ExecutorConfig | None,
    *,
    max_tokens: int | None,
    shard: tuple[int, int],
    threads: int | None,
    device: str,
    texts: bool,
    force: bool,
) -> Statistics:
    """Measure layer by layer, or whole where that cannot be done, and write the file."""
    from edgemoe.calibrate.collect import collect
    from edgemoe.calibrate.shards import calibrate_in_shards
    from edgemoe.calibrate.streamed import calibrate_streamed
    from edgemoe.errors import StreamingError
    from edgemoe.models import load_model, load_tokenizer
    from edgemoe.models.device import device_here

    try:
        if executor is not None:
            return calibrate_in_shards(
                model,
                tasks,
                output,
                executor,
                max_tokens=max_tokens,
                device=device,
                threads=threads,
                texts=texts,
                force=force,
            )
        return calibrate_streamed(
            model,
            tasks,
            output,
            max_tokens=max_tokens,
            shard=shard,
            device=device_here(device),
            texts=texts,
            force=force,
        )
    except StreamingError as error:
        _LOG.info("%s The whole model is loaded instead, in this process.", error)
    whole = load_model(model)
    whole.model.to(cast("Any", device_here(device)))
    statistics = collect(
        whole, tasks, load_tokenizer(model), max_tokens=max_tokens, shard=shard
    )
    if not texts:
        statistics = statistics.without_tokens()
    statistics.save(output, force=force)
    return statistics
