"""Measure a checkpoint that is larger than memory, one decoder layer at a time.

Each layer reads every window before the next layer is loaded. The sums of a layer are added in
the order of the windows, as :func:`edgemoe.calibrate.collect.collect` adds them, so both give
the same bits.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import torch

from edgemoe.calibrate.collect import sum_call
from edgemoe.calibrate.statistics import Statistics, TaskStatistics
from edgemoe.calibrate.sums import LayerSums
from edgemoe.calibrate.windows import SEQUENCE_LENGTH, cut_tasks
from edgemoe.layerwise.outputs import DEFAULT_LIMIT_BYTES, LayerOutputs
from edgemoe.layerwise.replay import map_tensors, only_layer
from edgemoe.models.checkpoint import load_tokenizer, quiet_transformers
from edgemoe.models.fingerprint import FileHashes, hash_file
from edgemoe.models.hooks import observe
from edgemoe.models.opening import open_streamed
from edgemoe.progress import counting
from edgemoe.resume import WorkDirectory, partial_path, resumable
from edgemoe.versions import library_versions

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from tokenizers import Tokenizer

    from edgemoe.calibrate.sample import Window
    from edgemoe.calibrate.windows import Windows
    from edgemoe.models.hooks import ExpertsFunction
    from edgemoe.models.layer import MoeLayer
    from edgemoe.models.opening import StreamedModel
    from edgemoe.models.routers import Routing
    from edgemoe.tasks import TaskFile

_PROGRESS = "progress.json"
_Sums = dict[str, dict[int, LayerSums]]


def calibrate_streamed(
    path: Path,
    tasks: Sequence[TaskFile],
    output: Path,
    *,
    max_tokens: int | None = None,
    sequence_length: int = SEQUENCE_LENGTH,
    shard: tuple[int, int] = (0, 1),
    limit_bytes: int = DEFAULT_LIMIT_BYTES,
    device: str = "cpu",
    force: bool = False,
) -> Statistics:
    """Measure tasks and write the statistics file.

    What each finished layer gave is kept in ``<output>.partial`` until the file is written; the
    same call goes on from there after an interruption.

    Args:
        path: Checkpoint directory.
        tasks: What to measure it on.
        output: The statistics file.
        max_tokens: As in :func:`edgemoe.calibrate.collect.collect`.
        sequence_length: As there.
        shard: As there.
        limit_bytes: Memory for what layers returned; the rest is read from files.
        device: Where layers compute, such as ``cuda:0``.
        force: Whether ``output``, and unfinished work of another call, may be replaced.

    Returns:
        The statistics.

    Raises:
        CheckpointError: The checkpoint is missing, unsafe or inconsistent.
        TaskFileError: No task has a token in this shard, or an argument is out of range.
        StreamingError: The family cannot be run layer by layer.
        OutputError: The output exists, or the disk refuses.
    """
    streamed = open_streamed(path, device=device)
    tokenizer = load_tokenizer(path)
    windows = cut_tasks(
        streamed.moe,
        tasks,
        tokenizer,
        max_tokens=max_tokens,
        sequence_length=sequence_length,
        shard=shard,
    )
    hashes = FileHashes(path)
    kind = torch.device(device).type
    options = [max_tokens, windows.sequence_length, list(shard), kind]
    key = work_key(path, tasks, options, hashes)
    with resumable(output, key, _PROGRESS, force=force) as work:
        statistics = _measure(streamed, tasks, windows, work, hashes, limit_bytes, device)
        statistics.save(output, force=force)
    return statistics


def collect_streamed(
    streamed: StreamedModel,
    tasks: Sequence[TaskFile],
    tokenizer: Tokenizer,
    work: WorkDirectory,
    hashes: FileHashes,
    *,
    max_tokens: int | None = None,
    limit_bytes: int = DEFAULT_LIMIT_BYTES,
) -> Statistics:
    """Measure tasks on a checkpoint that is open, as :func:`edgemoe.calibrate.collect.collect`.

    Args:
        streamed: The checkpoint.
        tasks: What to measure it on.
        tokenizer: The model's tokenizer.
        work: For what layers returned.
        hashes: Of the checkpoint's files, as far as they are known.
        max_tokens: As in :func:`edgemoe.calibrate.collect.collect`.
        limit_bytes: Memory for what layers returned; the rest is read from files.

    Returns:
        The statistics.

    Raises:
        TaskFileError: No task has a token.
        StreamingError: The family cannot be run layer by layer.
    """
    windows = cut_tasks(streamed.moe, tasks, tokenizer, max_tokens=max_tokens)
    return _measure(streamed, tasks, windows, work, hashes, limit_bytes)


def _measure(
    streamed: StreamedModel,
    tasks: Sequence[TaskFile],
    windows: Windows,
    work: WorkDirectory,
    hashes: FileHashes,
    limit_bytes: int,
    device: str = "cpu",
) -> Statistics:
    sums = _Run(streamed, work, windows.by_task, hashes, limit_bytes, device).measure()
    return Statistics(
        checkpoint_sha256=hashes.fingerprint(),
        shape=streamed.moe.shape,
        tasks={
            task.name: TaskStatistics(sources=(windows.source(task),), layers=sums[task.name])
            for task in tasks
        },
    )


def work_key(
    path: Path, tasks: Sequence[TaskFile], options: Sequence[Any], hashes: FileHashes
) -> dict[str, Any]:
    """Say what decides the result of a calibration.

    Args:
        path: Checkpoint directory.
        tasks: The tasks.
        options: JSON values.
        hashes: Those of the checkpoint.

    Returns:
        JSON values, for :func:`edgemoe.resume.resumable`.
    """
    return {
        "command": "calibrate",
        "checkpoint": hashes.stamps(),
        "tasks": {task.name: task.sha256 for task in tasks},
        "options": list(options),
        "tokenizer": hash_file(path / "tokenizer.json"),
        "versions": library_versions(),
    }


def layers_done(output: Path) -> int:
    """Tell how far the calibration of an output is.

    Args:
        output: The statistics file that it is to write.

    Returns:
        Decoder layers that are finished; 0 where it is not under way.
    """
    done = WorkDirectory(partial_path(output)).read(_PROGRESS)
    return 0 if done is None else int(done["layers_done"])


class _Run:
    """One calibration, over what an earlier one finished."""

    def __init__(
        self,
        streamed: StreamedModel,
        work: WorkDirectory,
        windows: Mapping[str, list[Window]],
        hashes: FileHashes,
        limit_bytes: int,
        device: str,
    ) -> None:
        self._streamed = streamed
        self._work = work
        self._windows = [(name, window) for name in windows for window in windows[name]]
        self._names = list(windows)
        self._hashes = hashes
        self._limit_bytes = limit_bytes
        self._device = device

    def measure(self) -> _Sums:
        sums: _Sums = {name: {} for name in self._names}
        skeleton = self._streamed.skeleton
        done = self._work.read(_PROGRESS)
        first = 0 if done is None else done["layers_done"]
        before = None
        if done is not None:
            self._hashes.recall(done["hashes"])
            for index in range(first):
                self._recall_sums(index, sums)
            before = LayerOutputs.reopen(self._work.path / _outputs_name(first - 1))
        last = max(layer.index for layer in self._streamed.moe.layers)
        if first > last:
            return sums
        steps = (last + 1 - first) * len(self._windows)
        with (
            quiet_transformers(),
            skeleton.outer(),
            counting(steps, "calibrate") as advance,
        ):
            for index in range(first, last + 1):
                for file, end in skeleton.extent_of(index).items():
                    self._hashes.advance(file, end)
                before = self._run_layer(index, before, sums, advance, is_last=index == last)
        return sums

    def _run_layer(
        self,
        index: int,
        before: LayerOutputs | None,
        sums: _Sums,
        advance: Callable[[], None],
        *,
        is_last: bool,
    ) -> LayerOutputs:
        skeleton = self._streamed.skeleton
        directory = self._work.empty_directory(_outputs_name(index))
        # Those of the layer before are in memory too.
        outputs = LayerOutputs(directory, self._limit_bytes // 2)
        task = self._names[0]

        def add(
            layer: MoeLayer, hidden: torch.Tensor, routing: Routing, run_expert: ExpertsFunction
        ) -> None:
            sums[task][layer.index] += sum_call(layer, hidden, routing, run_expert)

        earlier = itertools.repeat(None) if before is None else iter(before)
        with (
            skeleton.layer(index),
            observe(self._streamed.moe, add),
            only_layer(skeleton.decoder, skeleton.layers, index) as run,
        ):
            for layer in self._streamed.moe.layers:
                if layer.index == index:
                    for name in self._names:
                        sums[name][index] = LayerSums.zeros(layer.num_experts)
            for (name, window), given in zip(self._windows, earlier, strict=False):
                task = name
                ids = torch.tensor([window.ids], device=self._device)
                there = map_tensors(given, lambda tensor: tensor.to(self._device))
                returned = run({"input_ids": ids, "use_cache": False}, there)
                if not is_last:
                    outputs.append(map_tensors(returned, lambda tensor: tensor.cpu()))
                advance()
        outputs.finish()
        self._keep_sums(index, sums)
        self._work.write(
            _PROGRESS, {"layers_done": index + 1, "hashes": self._hashes.as_dict()}
        )
        if index:
            self._work.remove(_outputs_name(index - 1))
        return outputs

    def _keep_sums(self, index: int, sums: _Sums) -> None:
        from safetensors.numpy import save

        arrays = {
            f"{number}/{key}": value
            for number, name in enumerate(self._names)
            if index in sums[name]
            for key, value in sums[name][index].to_arrays().items()
        }
        if arrays:
            self._work.write_bytes(_sums_name(index), save(arrays))

    def _recall_sums(self, index: int, sums: _Sums) -> None:
        from safetensors.numpy import load

        file = self._work.path / _sums_name(index)
        if not file.exists():
            return
        arrays = load(file.read_bytes())
        for number, name in enumerate(self._names):
            found = {
                key.partition("/")[2]: value
                for key, value in arrays.items()
                if key.startswith(f"{number}/")
            }
            sums[name][index] = LayerSums.from_arrays(found)


def _outputs_name(index: int) -> str:
    return f"outputs-{index:05}"


def _sums_name(index: int) -> str:
    return f"sums-{index:05}.safetensors"
