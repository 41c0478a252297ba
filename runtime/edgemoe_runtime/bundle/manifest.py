"""The bundle's manifest: the one definition of the format; exporters write it through here."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgemoe_runtime.bundle.manifest_cache import KvCache
from edgemoe_runtime.bundle.manifest_ladder import KRung
from edgemoe_runtime.bundle.manifest_parts import (
    FileEntry,
    ModelInfo,
    SizeReport,
    TaskEntry,
    TensorSpec,
)
from edgemoe_runtime.bundle.manifest_rules import check_manifest
from edgemoe_runtime.errors import ManifestError, RequestError
from edgemoe_runtime.json_fields import Json, Value, parse_json, read_plain_text

if TYPE_CHECKING:
    from collections.abc import Mapping

FORMAT = "edgemoe.bundle"
SCHEMA_VERSION = 1
MANIFEST_FILE = "manifest.json"
_MAX_MANIFEST_BYTES = 64 << 20  # 64 MiB: a manifest is kilobytes; more is not one
_KEYS = (
    "format",
    "schema_version",
    "created_by",
    "model",
    "target",
    "flavour",
    "precision",
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
    """What a bundle holds.

    Attributes:
        created_by: program and version that wrote the bundle, such as "edgemoe 0.1.0".
        model: the language model.
        target: `cpu`, `cuda`, `tensorrt`, `tensorrt-rtx`, `jetson-orin` or `jetson-thor`.
        flavour: `ort` or `tensorrt`: whose operators the graphs use.
        precision: `fp32`, `fp16`, `int8` or `int4`.
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
    kv_cache: KvCache
    tasks: Mapping[str, TaskEntry]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    k_ladder: tuple[KRung, ...]
    size: SizeReport
    files: Mapping[str, FileEntry]

    def __post_init__(self) -> None:
        check_manifest(self)

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Manifest:
        """Read and check the manifest of a bundle.

        Raises:
            ManifestError: when it is missing, of another schema version, or malformed.
        """
        path = Path(directory) / MANIFEST_FILE
        try:
            text = read_plain_text(path, _MAX_MANIFEST_BYTES)
        except FileNotFoundError as error:
            raise ManifestError(
                f"A bundle must hold {MANIFEST_FILE}, got none in {directory}. Give the"
                " directory that `edgemoe export -o` wrote, or export again: an interrupted"
                " export leaves no manifest."
            ) from error
        except (OSError, UnicodeDecodeError) as error:
            raise ManifestError(
                f"{path} must be readable UTF-8 text, got: {error}. Check its permissions or"
                " export the bundle again."
            ) from error
        return cls.from_json(parse_json(text, str(path)))

    @classmethod
    def from_json(cls, document: Json) -> Manifest:
        """Build a manifest from a parsed JSON document.

        Raises:
            ManifestError: when the document is not a manifest of this schema version.
        """
        _check_version(document)
        root = Value(document, "manifest").fields(*_KEYS)
        return cls(
            created_by=root["created_by"].text(),
            model=ModelInfo.read(root["model"]),
            target=root["target"].text(),
            flavour=root["flavour"].text(),
            precision=root["precision"].text(),
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
        """Return the JSON document; `from_json` of it gives an equal manifest."""
        return {
            "format": FORMAT,
            "schema_version": SCHEMA_VERSION,
            "created_by": self.created_by,
            "model": self.model.to_json(),
            "target": self.target,
            "flavour": self.flavour,
            "precision": self.precision,
            "kv_cache": self.kv_cache.to_json(),
            "tasks": {name: task.to_json() for name, task in self.tasks.items()},
            "inputs": [spec.to_json() for spec in self.inputs],
            "outputs": [spec.to_json() for spec in self.outputs],
            "k_ladder": [rung.to_json() for rung in self.k_ladder],
            "size": self.size.to_json(),
            "files": {path: entry.to_json() for path, entry in sorted(self.files.items())},
        }

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write manifest.json whole or not at all; call it last.

        Returns:
            The path of the file.

        Raises:
            OSError: when the directory cannot be written.
        """
        folder = Path(directory)
        text = json.dumps(self.to_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        descriptor, temporary = tempfile.mkstemp(prefix=".manifest-", dir=folder)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            # mkstemp makes 0600; a bundle is as readable as its other files
            Path(temporary).chmod(0o644)
            Path(temporary).replace(folder / MANIFEST_FILE)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        return folder / MANIFEST_FILE

    def task(self, name: str | None) -> tuple[str, TaskEntry]:
        """Return one task; None is allowed where the bundle has a single task.

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
        """Return the ladder of one task: its own, or what of the bundle's its graph takes."""
        entry = self.tasks[task]
        if entry.k_ladder is not None:
            return entry.k_ladder
        return tuple(
            rung for rung in self.k_ladder if max(rung.k_cap, default=0) <= entry.top_k
        )


def _check_version(document: Json) -> None:
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ManifestError(
            f'A manifest must be a JSON object with "format": "{FORMAT}", got another file.'
            " Give the directory that `edgemoe export -o` wrote."
        )
    version = document.get("schema_version")
    if version != SCHEMA_VERSION or isinstance(version, bool):
        writer = document.get("created_by", "an unknown program")
        raise ManifestError(
            f"schema_version must be {SCHEMA_VERSION}, got {version!r} written by {writer}."
            " Install the edgemoe that wrote the bundle, or export it again with this one."
        )
