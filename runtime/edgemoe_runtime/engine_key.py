"""The cache of TensorRT engines in a bundle: what an engine was built from, and finding it.

An engine is only good for the graph, weights, TensorRT version, compute capability, shapes
and flags that it was built with. All of that is its *key*, stored as JSON beside it:

    engines/<task>__<precision>__trt<version>__sm<NN>.engine
    engines/<task>__<precision>__trt<version>__sm<NN>.engine.json

The compiler writes both through here, the runtime finds them through here. The hash in the
key shows a damaged or stale engine; it is no protection against somebody who can write to the
folder: an engine is executable, so build it where it runs or take it from a trusted source.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgemoe_runtime.errors import BackendUnavailableError, ManifestError
from edgemoe_runtime.json_fields import Json, Value, parse_json
from edgemoe_runtime.manifest_rules import ENGINES_FOLDER

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from edgemoe_runtime.manifest import Manifest

FORMAT = "edgemoe.engine"
SCHEMA_VERSION = 1
PACKAGES = ("tensorrt", "tensorrt_rtx")
SHARED_WEIGHTS = "shared.onnx.data"
_MAX_RECORD_BYTES = 16 << 20  # 16 MiB: shapes and a command line are kilobytes
_HASHED_AT_ONCE = 1 << 22


@dataclass(frozen=True, kw_only=True)
class ShapeRange:
    """Shapes of one graph input that an optimisation profile covers."""

    minimum: tuple[int, ...]
    optimum: tuple[int, ...]
    maximum: tuple[int, ...]

    def covers(self, shape: tuple[int, ...]) -> bool:
        """Return whether a tensor of this shape may be bound."""
        return len(shape) == len(self.minimum) and all(
            low <= size <= high
            for low, size, high in zip(self.minimum, shape, self.maximum, strict=True)
        )

    @classmethod
    def read(cls, value: Value) -> ShapeRange:
        """Read from JSON."""
        fields = value.fields("min", "opt", "max")
        minimum, optimum, maximum = (
            tuple(item.integer(0) for item in fields[name].items())
            for name in ("min", "opt", "max")
        )
        return cls(minimum=minimum, optimum=optimum, maximum=maximum)

    def to_json(self) -> dict[str, Json]:
        """Return the JSON object."""
        return {
            "min": list(self.minimum),
            "opt": list(self.optimum),
            "max": list(self.maximum),
        }


@dataclass(frozen=True, kw_only=True)
class EngineKey:
    """All that an engine depends on.

    Attributes:
        task: task of the bundle.
        precision: precision of the bundle.
        files: sha256 of the graph and of each file of weights it may read, by name.
        package: `tensorrt` or `tensorrt_rtx`.
        version: version of that package, such as "10.3.0".
        compute_capability: major times ten plus minor: 87 is SM 8.7.
        profiles: optimisation profiles in the engine's order; each gives, per graph input,
            the shapes it covers. The first covers everything that the engine can do.
        flags: builder settings that change the engine.
    """

    task: str
    precision: str
    files: Mapping[str, str]
    package: str
    version: str
    compute_capability: int
    profiles: tuple[Mapping[str, ShapeRange], ...]
    flags: Mapping[str, Json]

    @property
    def file_name(self) -> str:
        """Name of the engine in engines/."""
        return engine_file_name(
            self.task, self.precision, self.package, self.version, self.compute_capability
        )

    @property
    def digest(self) -> str:
        """sha256 of the key."""
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @classmethod
    def read(cls, value: Value) -> EngineKey:
        """Read from JSON."""
        fields = value.fields(
            "task",
            "precision",
            "files",
            "package",
            "version",
            "compute_capability",
            "profiles",
            "flags",
        )
        return cls(
            task=fields["task"].text(),
            precision=fields["precision"].text(),
            files={name: item.sha256() for name, item in fields["files"].mapping().items()},
            package=fields["package"].one_of(*PACKAGES),
            version=fields["version"].text(),
            compute_capability=fields["compute_capability"].integer(10),
            profiles=tuple(
                {name: ShapeRange.read(item) for name, item in profile.mapping().items()}
                for profile in fields["profiles"].items()
            ),
            flags=fields["flags"].free_form(),
        )

    def to_json(self) -> dict[str, Json]:
        """Return the JSON object; `read` of it gives an equal key."""
        return {
            "task": self.task,
            "precision": self.precision,
            "files": dict(sorted(self.files.items())),
            "package": self.package,
            "version": self.version,
            "compute_capability": self.compute_capability,
            "profiles": [
                {name: shapes.to_json() for name, shapes in profile.items()}
                for profile in self.profiles
            ],
            "flags": dict(self.flags),
        }


@dataclass(frozen=True, kw_only=True)
class EngineRecord:
    """What stands beside an engine.

    Attributes:
        key: what it was built from.
        sha256: digest of the engine file.
        size: its bytes.
        build_seconds: how long the build took.
        created_by: program and version.
        command: the same build by hand, as a shell command line.
    """

    key: EngineKey
    sha256: str
    size: int
    build_seconds: float
    created_by: str
    command: str

    @classmethod
    def load(cls, engine: Path) -> EngineRecord:
        """Read the record of an engine.

        Raises:
            ManifestError: it is missing or malformed.
        """
        path = record_path(engine)
        try:
            if path.stat().st_size > _MAX_RECORD_BYTES:
                raise ManifestError(f"{path} must be at most {_MAX_RECORD_BYTES} bytes.")
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ManifestError(f"{path} must be readable UTF-8 text, got: {error}.") from error
        fields = Value(parse_json(text, str(path)), str(path)).fields(
            "format",
            "schema_version",
            "created_by",
            "key",
            "key_sha256",
            "engine_sha256",
            "engine_size",
            "build_seconds",
            "command",
        )
        fields["format"].one_of(FORMAT)
        if fields["schema_version"].integer(1) != SCHEMA_VERSION:
            fields["schema_version"].refuse(f"be {SCHEMA_VERSION}")
        record = cls(
            key=EngineKey.read(fields["key"]),
            sha256=fields["engine_sha256"].sha256(),
            size=fields["engine_size"].integer(1),
            build_seconds=fields["build_seconds"].number(),
            created_by=fields["created_by"].text(),
            command=fields["command"].text(),
        )
        if fields["key_sha256"].sha256() != record.key.digest:
            fields["key_sha256"].refuse("be the digest of the key")
        return record

    def to_json(self) -> dict[str, Json]:
        """Return the JSON object."""
        return {
            "format": FORMAT,
            "schema_version": SCHEMA_VERSION,
            "created_by": self.created_by,
            "key": self.key.to_json(),
            "key_sha256": self.key.digest,
            "engine_sha256": self.sha256,
            "engine_size": self.size,
            "build_seconds": self.build_seconds,
            "command": self.command,
        }

    def damage(self, engine: Path) -> str | None:
        """Return how the engine file differs from the record, or None where it is intact."""
        if engine.is_symlink() or not engine.is_file():
            return "it is not a regular file"
        size = engine.stat().st_size
        if size != self.size:
            return f"it has {size} bytes, not {self.size}"
        return None if file_sha256(engine) == self.sha256 else "its sha256 is another"


def engine_file_name(
    task: str, precision: str, package: str, version: str, compute_capability: int
) -> str:
    """Return the name of an engine in engines/."""
    label = f"rtx{version}" if package == "tensorrt_rtx" else version
    return f"{task}__{precision}__trt{label}__sm{compute_capability}.engine"


def record_path(engine: Path) -> Path:
    """Return where the record of an engine is."""
    return engine.with_name(f"{engine.name}.json")


def graph_files(manifest: Manifest, task: str) -> dict[str, str]:
    """Return the sha256 of a task's graph and of the weights it may read, by file name."""
    names = (manifest.tasks[task].graph, SHARED_WEIGHTS, f"{manifest.tasks[task].graph}.data")
    return {name: manifest.files[name].sha256 for name in names if name in manifest.files}


def find_engine(
    bundle: Path,
    manifest: Manifest,
    task: str,
    *,
    package: str,
    version: str,
    compute_capability: int,
) -> tuple[Path, EngineRecord]:
    """Find the engine of a task for this machine, whole and up to date.

    Args:
        bundle: directory of the bundle.
        manifest: its manifest, whose hashes were verified.
        task: task to run.
        package: `tensorrt` or `tensorrt_rtx`.
        version: version of the package that will load it.
        compute_capability: major times ten plus minor of the GPU that will run it.

    Returns:
        The engine's path and its record, whose profiles tell the shapes it accepts.

    Raises:
        BackendUnavailableError: there is none, or it is stale or damaged; the message is
            the reason and how to build one.
    """
    name = engine_file_name(task, manifest.precision, package, version, compute_capability)
    engine = bundle / ENGINES_FOLDER / name
    target = _target(manifest, package)
    remedy = f"Run `edgemoe compile {bundle} --target {target} --task {task}`."
    if not engine.exists():
        raise BackendUnavailableError(f"there is no engine {ENGINES_FOLDER}/{name}. {remedy}")
    try:
        record = EngineRecord.load(engine)
    except ManifestError as error:
        raise BackendUnavailableError(
            f"the record of engine {name} cannot be used: {error} {remedy}"
        ) from error
    if record.key.file_name != name or dict(record.key.files) != graph_files(manifest, task):
        raise BackendUnavailableError(
            f"engine {name} was built from another graph or other weights. {remedy}"
        )
    damage = record.damage(engine)
    if damage is not None:
        raise BackendUnavailableError(f"engine {name} is damaged: {damage}. {remedy}")
    return engine, record


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASHED_AT_ONCE):
            digest.update(block)
    return digest.hexdigest()


def _target(manifest: Manifest, package: str) -> str:
    if package == "tensorrt_rtx":
        return "tensorrt-rtx"
    return manifest.target if manifest.target.startswith("jetson-") else "tensorrt"
