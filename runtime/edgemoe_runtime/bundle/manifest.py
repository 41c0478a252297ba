"""The manifest of a bundle: the one definition of the format, which exporters write."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgemoe_runtime.bundle.cache_spec import KvCache
from edgemoe_runtime.bundle.file_entry import FileEntry, SizeReport
from edgemoe_runtime.bundle.graph_spec import ModelInfo, TensorSpec
from edgemoe_runtime.bundle.k_ladder import KRung
from edgemoe_runtime.bundle.names import BUNDLE_FORMAT, SCHEMA_VERSION
from edgemoe_runtime.bundle.task_entry import TaskEntry
from edgemoe_runtime.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgemoe_runtime.json_fields import Json, Value

_KEYS = (
    "format",
    "schema_version",
    "created_by",
    "model",
    "target",
    "flavour",
    "precision",
    "needs_onnxruntime",
    "kv_cache",
    "tasks",
    "inputs",
    "outputs",
    "k_ladder",
    "size",
    "files",
)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Content of a bundle: model, graphs by task, their interface and their files.

    Attributes:
        created_by: program and version that wrote the bundle, such as "edgemoe 0.1.0".
        model: the language model.
        target: `cpu`, `cuda`, `tensorrt`, `tensorrt-rtx`, `jetson-orin` or `jetson-thor`.
        flavour: `ort` or `tensorrt`: whose operators the graphs use.
        precision: `fp32`, `fp16`, `int8` or `int4`.
        needs_onnxruntime: the oldest release of onnxruntime that computes all graphs right, as
            major and minor number such as "1.31"; TensorRT's own engines need none.
        kv_cache: form and shape of the key-value cache.
        tasks: one graph per task; a single unnamed task is called "model".
        inputs: graph inputs, the same for every task.
        outputs: graph outputs, the same for every task.
        k_ladder: steps of the experts-per-token cap for tasks without a ladder of their own,
            the first one is the full k.
        size: bytes on disk.
        files: every file of the bundle but manifest.json and engines/, by POSIX path.
    """

    created_by: str
    model: ModelInfo
    target: str
    flavour: str
    precision: str
    needs_onnxruntime: str
    kv_cache: KvCache
    tasks: Mapping[str, TaskEntry]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    k_ladder: tuple[KRung, ...]
    size: SizeReport
    files: Mapping[str, FileEntry]

    @classmethod
    def read(cls, value: Value) -> Manifest:
        """Read from JSON; `parse_manifest` also checks what is read.

        Args:
            value: the document.

        Returns:
            The manifest, unchecked.

        Raises:
            ManifestError: when a key is missing or unknown, or a value has another type.
        """
        root = value.fields(*_KEYS)
        return cls(
            created_by=root["created_by"].text(),
            model=ModelInfo.read(root["model"]),
            target=root["target"].text(),
            flavour=root["flavour"].text(),
            precision=root["precision"].text(),
            needs_onnxruntime=root["needs_onnxruntime"].text(),
            kv_cache=KvCache.read(root["kv_cache"]),
            tasks={
                name: TaskEntry.read(value) for name, value in root["tasks"].mapping().items()
            },
            inputs=tuple(TensorSpec.read(value) for value in root["inputs"].items()),
            outputs=tuple(TensorSpec.read(value) for value in root["outputs"].items()),
            k_ladder=tuple(KRung.read(value) for value in root["k_ladder"].items()),
            size=SizeReport.read(root["size"]),
            files={
                path: FileEntry.read(value) for path, value in root["files"].mapping().items()
            },
        )

    def to_json(self) -> dict[str, Json]:
        """Convert to JSON.

        Returns:
            The document of manifest.json; `read` of it gives an equal manifest.
        """
        return {
            "format": BUNDLE_FORMAT,
            "schema_version": SCHEMA_VERSION,
            "created_by": self.created_by,
            "model": self.model.to_json(),
            "target": self.target,
            "flavour": self.flavour,
            "precision": self.precision,
            "needs_onnxruntime": self.needs_onnxruntime,
            "kv_cache": self.kv_cache.to_json(),
            "tasks": {name: task.to_json() for name, task in self.tasks.items()},
            "inputs": [spec.to_json() for spec in self.inputs],
            "outputs": [spec.to_json() for spec in self.outputs],
            "k_ladder": [rung.to_json() for rung in self.k_ladder],
            "size": self.size.to_json(),
            "files": {path: entry.to_json() for path, entry in sorted(self.files.items())},
        }

    def task(self, name: str | None) -> tuple[str, TaskEntry]:
        """Return one task.

        Args:
            name: name of the task; None is allowed where the bundle has a single one.

        Returns:
            Its name and its entry.

        Raises:
            RequestError: when there is no such task, or None is ambiguous.
        """
        if name is None:
            if len(self.tasks) == 1:
                return next(iter(self.tasks.items()))
            raise RequestError(
                "A task must be named where a bundle has several, got None. Choose one of"
                f" {', '.join(sorted(self.tasks))}."
            )
        if name not in self.tasks:
            raise RequestError(
                f"task must be one of {', '.join(sorted(self.tasks))}, got {name!r}."
            )
        return name, self.tasks[name]

    def ladder(self, task: str) -> tuple[KRung, ...]:
        """Return the k ladder of one task.

        Args:
            task: name of the task.

        Returns:
            Its own rungs, or those of the bundle that its graph can run; the full k first.
        """
        entry = self.tasks[task]
        if entry.k_ladder is not None:
            return entry.k_ladder
        return tuple(
            rung for rung in self.k_ladder if max(rung.k_cap, default=0) <= entry.top_k
        )
