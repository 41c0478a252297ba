"""The statistics file: additive sums per task and MoE layer, in safetensors.

One float64 tensor per sum, named `{task}/{layer}/{sum}` (`edgemoe.calibrate.sums`
defines the sums), beside it for the sums that are no counts an int64 tensor
`{task}/{layer}/{sum}_remainder` (what makes addition exact: nobody else needs it), for each
pass over a task file `{task}/source-{n}/ids` and `/windows`, the tokens that it read
(`edgemoe.calibrate.sample`), and one JSON header under the metadata key `edgemoe`::

    {"format": "edgemoe.statistics", "version": 3, "created_by": "edgemoe 0.1.0",
     "checkpoint_sha256": "...",
     "shape": {"family": "glm4_moe", "hidden_size": 576, "intermediate_size": 64,
               "layers": [{"layer": 0, "num_experts": 16, "top_k": 6, ...}, ...]},
     "tasks": {"<task>": [{"sha256": "...", "lines": 10, "tokens": 812, "shard": [0, 1],
                           "sequence_length": 512, "max_tokens": null}, ...]}}

Each entry of a task's list is one pass over (a shard of) a task file; shards that make up the
whole file become one entry, so that the file is the one that a single run writes. The same
content always gives the same bytes, so the file's hash names it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgemoe.calibrate.sample import TokenSample
from edgemoe.calibrate.statistics_header import read_header
from edgemoe.calibrate.sums import LayerSums, array_types
from edgemoe.calibrate.task_statistics import Source, TaskStatistics, refuse_overlap
from edgemoe.errors import StatisticsError
from edgemoe.file_kinds import describe_mistake, identify
from edgemoe.models.shapes import ModelShape
from edgemoe.staging import staged_file
from edgemoe.versions import __version__
from edgemoe_runtime.input_files import parse_strict

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from edgemoe.models.shapes import ModelShape


FORMAT = "edgemoe.statistics"
VERSION = 3
_METADATA_KEY = "edgemoe"


@dataclass(frozen=True, kw_only=True, eq=False)
class Statistics:
    """Sums of one checkpoint, by task.

    Attributes:
        checkpoint_sha256: Fingerprint of the checkpoint that was measured.
        shape: Its MoE layers.
        tasks: The tasks' sums by name.
    """

    checkpoint_sha256: str
    shape: ModelShape
    tasks: Mapping[str, TaskStatistics]

    def task(self, name: str) -> TaskStatistics:
        """Return one task's sums.

        Args:
            name: The task.

        Returns:
            Its sums.

        Raises:
            StatisticsError: The task was not calibrated.
        """
        if name not in self.tasks:
            raise StatisticsError(
                f"the task must be one of {sorted(self.tasks)}, which the statistics hold, got "
                f"{name!r}. Run `edgemoe calibrate` with --task {name}=FILE."
            )
        return self.tasks[name]

    @property
    def has_tokens(self) -> bool:
        """Whether the text of some calibration can be read from it."""
        return any(
            source.sample.has_tokens for task in self.tasks.values() for source in task.sources
        )

    def without_tokens(self) -> Statistics:
        """Leave out the tokens that were read, and with them the text.

        Returns:
            The same sums, for methods that run no layers.
        """
        tasks = {
            name: replace(
                task,
                sources=tuple(
                    replace(source, sample=source.sample.without_tokens())
                    for source in task.sources
                ),
            )
            for name, task in self.tasks.items()
        }
        return replace(self, tasks=tasks)

    @property
    def sha256(self) -> str:
        """Hash of the file that `save` writes."""
        return hashlib.sha256(self._to_bytes()).hexdigest()

    def save(self, path: Path | str, *, force: bool = False) -> None:
        """Write the file, whole or not at all, for its owner alone: it can hold text.

        Args:
            path: The file to write.
            force: Whether an existing file may be replaced.

        Raises:
            OutputError: The file exists and `force` is false, or it cannot be written.
        """
        with staged_file(Path(path), force=force) as staged:
            staged.touch(mode=0o600)
            staged.write_bytes(self._to_bytes())

    @classmethod
    def load(cls, path: Path | str) -> Statistics:
        """Read and check a statistics file.

        Args:
            path: The file.

        Returns:
            The statistics.

        Raises:
            StatisticsError: The file is missing, is not a statistics file, has another
                version, or a sum is missing, malformed or not finite.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        path = Path(path)
        if identify(path).name != "statistics":
            raise StatisticsError(
                "statistics must be a file that `edgemoe calibrate` wrote, got "
                f"{describe_mistake(path)}. Pass the file that calibrate's -o named."
            )
        try:
            header = _read_header(path)
            tensors = load_file(path)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, StatisticsError):
                raise
            raise StatisticsError(
                f"{path} must be a file that `edgemoe calibrate` wrote, got one that cannot be "
                f"read: {error}."
            ) from error
        return _assemble(header, tensors, path)

    @staticmethod
    def read_shape(path: Path) -> ModelShape:
        """Read which layers were measured, from the header of a file that `load` takes.

        Args:
            path: The file.

        Returns:
            The model's MoE layers.

        Raises:
            StatisticsError: The header is of another version, or malformed.
        """
        return read_header(_read_header(path), f"{path}: the header")[1]

    def _to_bytes(self) -> bytes:
        from safetensors.numpy import save

        header = {
            "format": FORMAT,
            "version": VERSION,
            "created_by": f"edgemoe {__version__}",
            "checkpoint_sha256": self.checkpoint_sha256,
            "shape": _shape_header(self.shape),
            "tasks": {
                name: [source.header() for source in task.sources]
                for name, task in sorted(self.tasks.items())
            },
        }
        tensors = {
            f"{name}/{layer}/{key}": value
            for name, task in self.tasks.items()
            for layer, sums in task.layers.items()
            for key, value in sums.to_arrays().items()
        }
        for name, task in self.tasks.items():
            for number, source in enumerate(task.sources):
                for key, array in source.sample.to_arrays().items():
                    tensors[f"{name}/source-{number}/{key}"] = array
        return save(tensors, metadata={_METADATA_KEY: json.dumps(header)})


def merge(first: Statistics, *others: Statistics) -> Statistics:
    """Add statistics of one checkpoint up: tasks unite, sums of the same task add.

    Args:
        first: Statistics.
        *others: More of them, over other data.

    Returns:
        The statistics over all the data.

    Raises:
        StatisticsError: Two of them measure different checkpoints, or the same lines of a
            file for the same task.
    """
    merged = first
    for other in others:
        if other.checkpoint_sha256 != first.checkpoint_sha256 or other.shape != first.shape:
            raise StatisticsError(
                "statistics must come from one checkpoint to add up, got "
                f"{first.checkpoint_sha256[:12]} ({len(first.shape.layers)} MoE layers) "
                f"and {other.checkpoint_sha256[:12]} ({len(other.shape.layers)} MoE layers). "
                "Calibrate the same checkpoint for both."
            )
        tasks = dict(merged.tasks)
        for name, task in other.tasks.items():
            if name in tasks:
                refuse_overlap(name, tasks[name].sources, task.sources)
            tasks[name] = tasks[name] + task if name in tasks else task
        merged = replace(merged, tasks=tasks)
    return merged


def _read_header(path: Path) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata() or {}
    header = parse_strict(metadata[_METADATA_KEY])
    if (header["format"], header["version"]) != (FORMAT, VERSION):
        raise StatisticsError(
            f"{path} must be {FORMAT} version {VERSION}, got {header['format']} version "
            f"{header['version']}. Calibrate again with this version of edgemoe."
        )
    checked: dict[str, Any] = header
    return checked


def _shape_header(shape: ModelShape) -> dict[str, Any]:
    """Write widths of layers only where they differ: others stay the bytes that they were."""
    header = asdict(shape)
    for layer in header["layers"]:
        if layer["intermediate_size"] is None:
            del layer["intermediate_size"]
    return header


def _assemble(
    header: dict[str, Any], tensors: Mapping[str, NDArray[Any]], path: Path
) -> Statistics:
    checkpoint_sha256, shape, passes = read_header(header, f"{path}: the header")
    try:
        sources = {
            name: tuple(
                Source(**entry, sample=_read_sample(f"{name}/source-{number}", tensors))
                for number, entry in enumerate(entries)
            )
            for name, entries in passes.items()
        }
    except (KeyError, ValueError) as error:
        raise StatisticsError(
            f"{path}: each pass over a task must have its tokens, got: {error}. Calibrate "
            "again."
        ) from error
    tasks = {
        name: TaskStatistics(
            sources=entries,
            layers={
                layer.layer: _layer_sums(
                    f"{name}/{layer.layer}", layer.num_experts, tensors, path
                )
                for layer in shape.layers
            },
        )
        for name, entries in sources.items()
    }
    return Statistics(checkpoint_sha256=checkpoint_sha256, shape=shape, tasks=tasks)


def _read_sample(prefix: str, tensors: Mapping[str, NDArray[Any]]) -> TokenSample:
    names = ("ids", "windows")
    return TokenSample.from_arrays({name: tensors[f"{prefix}/{name}"] for name in names})


def _layer_sums(
    prefix: str, experts: int, tensors: Mapping[str, NDArray[Any]], path: Path
) -> LayerSums:
    arrays = {}
    for name, (kind, shape) in array_types(experts).items():
        value = tensors.get(f"{prefix}/{name}")
        if value is None or value.dtype != kind or value.shape != shape:
            found = "none" if value is None else f"{value.dtype}{list(value.shape)}"
            raise StatisticsError(
                f"{path}: {prefix}/{name} must be {kind}{list(shape)}, got {found}. "
                "Calibrate again."
            )
        if not np.isfinite(value).all():
            raise StatisticsError(
                f"{path}: {prefix}/{name} must be finite, got NaN or infinity. "
                "Calibrate again; if it stays, the checkpoint overflows."
            )
        arrays[name] = value
    return LayerSums.from_arrays(arrays)
