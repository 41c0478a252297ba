"""Keys of the TensorRT engines in a bundle's engines/ folder; the compiler writes them.

An engine is executable: it is loaded only when its key names this very graph, package
version and device, and when its bytes have the digest that its key recorded. That guards
against stale and damaged engines; whoever can write to engines/ is trusted.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from edgemoe_runtime.bundle.names import (
    ENGINES_FOLDER,
    SHARED_WEIGHTS_FILE,
    graph_file,
    weights_file,
)
from edgemoe_runtime.errors import ManifestError
from edgemoe_runtime.json_fields import Json, Value, parse_json, read_plain_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from edgemoe_runtime.bundle.manifest import Manifest

FORMAT = "edgemoe.engine"
VERSION = 1
PACKAGES = ("tensorrt", "tensorrt_rtx")
_HASH_CHUNK_BYTES = 1 << 20  # 1 MiB
_MAX_KEY_BYTES = 1 << 20
_FILE_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")

ShapeRange = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""Smallest, optimal and largest shape of one graph input."""


@dataclass(frozen=True, kw_only=True)
class EngineKey:
    """Graph, package and device that an engine was built for.

    Attributes:
        task: task of the bundle.
        graph_sha256: `graph_fingerprint` of the task: graph and weights.
        precision: precision of the bundle.
        package: `tensorrt` or `tensorrt_rtx`, the Python module that built it.
        package_version: its full version.
        compute_capability: major * 10 + minor, such as 86 or 121.
        shapes: range of every dynamic input, by input name.
        flags: other build choices, such as {"strongly_typed": true}.
        engine_sha256: digest of the engine file.
        engine_size: its bytes.
        command: the command line that builds the same by hand, or "".
    """

    task: str
    graph_sha256: str
    precision: str
    package: str
    package_version: str
    compute_capability: int
    shapes: Mapping[str, ShapeRange]
    engine_sha256: str
    engine_size: int
    flags: Mapping[str, Json] = field(default_factory=dict[str, Json])
    command: str = ""

    @property
    def file_name(self) -> str:
        """Name of the engine file; its key lies beside it with the suffix .json."""
        version = self.package_version
        return (
            f"{self.task}__{self.precision}__trt{version}__sm{self.compute_capability}.engine"
        )

    def to_json(self) -> dict[str, Json]:
        """Return the JSON document."""
        shapes: dict[str, Json] = {
            name: [list(shape) for shape in bounds] for name, bounds in self.shapes.items()
        }
        return {
            "format": FORMAT,
            "version": VERSION,
            "task": self.task,
            "graph_sha256": self.graph_sha256,
            "precision": self.precision,
            "package": self.package,
            "package_version": self.package_version,
            "compute_capability": self.compute_capability,
            "shapes": shapes,
            "flags": dict(self.flags),
            "engine_sha256": self.engine_sha256,
            "engine_size": self.engine_size,
            "command": self.command,
        }

    def dumps(self) -> str:
        """Return the text of the key file."""
        return json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n"

    @classmethod
    def load(cls, path: Path) -> EngineKey:
        """Read a key file.

        Raises:
            ManifestError: when it is not a key of this version.
        """
        try:
            text = read_plain_text(path, _MAX_KEY_BYTES)
        except (OSError, UnicodeDecodeError) as error:
            raise ManifestError(
                f"An engine key must be readable UTF-8 text, got {path}: {error}. Build the"
                " engine again with `edgemoe compile`."
            ) from error
        root = Value(parse_json(text, str(path)), path.name).fields(
            "format",
            "version",
            "task",
            "graph_sha256",
            "precision",
            "package",
            "package_version",
            "compute_capability",
            "shapes",
            "flags",
            "engine_sha256",
            "engine_size",
            "command",
        )
        root["format"].one_of(FORMAT)
        if root["version"].integer(1) != VERSION:
            root["version"].refuse(f"be {VERSION}")
        command = root["command"].raw()
        return cls(
            task=_file_part(root["task"]),
            graph_sha256=root["graph_sha256"].sha256(),
            precision=_file_part(root["precision"]),
            package=root["package"].one_of(*PACKAGES),
            package_version=_file_part(root["package_version"]),
            compute_capability=root["compute_capability"].integer(1),
            shapes={name: _shapes(item) for name, item in root["shapes"].mapping().items()},
            flags=root["flags"].free_form(),
            engine_sha256=root["engine_sha256"].sha256(),
            engine_size=root["engine_size"].integer(1),
            command=command if isinstance(command, str) else "",
        )


def _file_part(value: Value) -> str:
    """Return a text that becomes a part of a file's name."""
    text = value.text()
    if _FILE_PART.fullmatch(text) is None:
        value.refuse("be letters, digits, '.', '_', '+' or '-', 64 at most")
    return text


@dataclass(frozen=True)
class EngineSearch:
    """The engine that fits, or the reason why none does."""

    path: Path | None
    key: EngineKey | None
    reason: str


def graph_fingerprint(manifest: Manifest, task: str) -> str:
    """Return the sha256 over the digests of a task's graph and of its weights.

    The graph's own digest is not enough: its weights lie in other files.
    """
    names = (graph_file(task), weights_file(task), SHARED_WEIGHTS_FILE)
    lines = [
        f"{name} {manifest.files[name].sha256}\n" for name in names if name in manifest.files
    ]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def find_engine(
    bundle: Path,
    manifest: Manifest,
    task: str,
    *,
    package: str,
    package_version: str,
    compute_capabilities: Sequence[int],
) -> EngineSearch:
    """Look for an engine that fits this graph, package and device.

    Args:
        bundle: directory of the bundle.
        manifest: its manifest.
        task: task to run.
        package: `tensorrt` or `tensorrt_rtx`.
        package_version: version installed here.
        compute_capabilities: of this device's GPU.

    Returns:
        The engine with its key, its digest checked, or a reason.
    """
    folder = bundle / ENGINES_FOLDER
    wanted = {
        "task": task,
        "graph_sha256": graph_fingerprint(manifest, task),
        "precision": manifest.precision,
        "package": package,
        "package_version": package_version,
    }
    misses: list[str] = []
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else []:
        try:
            key = EngineKey.load(path)
        except ManifestError as error:
            misses.append(str(error))
            continue
        different = [name for name, value in wanted.items() if getattr(key, name) != value]
        if key.compute_capability not in compute_capabilities:
            different.append("compute_capability")
        if different:
            misses.append(f"{path.stem} differs in {', '.join(different)}")
            continue
        engine = path.with_name(key.file_name)
        problem = _damage(engine, key)
        if problem is None:
            return EngineSearch(engine, key, "")
        misses.append(problem)
    found = "; ".join(misses) if misses else "the folder holds none"
    devices = ", ".join(f"sm{capability}" for capability in compute_capabilities)
    return EngineSearch(
        None,
        None,
        f"no engine in {ENGINES_FOLDER}/ fits {package} {package_version} on {devices}"
        f" ({found}); build one on this device with `edgemoe compile`",
    )


def hash_file(path: Path) -> str:
    """Return the sha256 of a file in hexadecimal digits.

    Raises:
        OSError: when it cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _damage(engine: Path, key: EngineKey) -> str | None:
    if engine.is_symlink() or not engine.is_file():
        return f"{engine.name} is missing"
    if engine.stat().st_size != key.engine_size or hash_file(engine) != key.engine_sha256:
        return f"{engine.name} does not have the digest that its key recorded"
    return None


def _shapes(value: Value) -> ShapeRange:
    bounds = [tuple(size.integer(0) for size in shape.items()) for shape in value.items()]
    if len(bounds) != 3:
        value.refuse("be [smallest, optimal, largest]")
    return bounds[0], bounds[1], bounds[2]
