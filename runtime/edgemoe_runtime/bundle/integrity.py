"""Check a bundle before any engine sees it: digests, file kinds, external data, graph ends."""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from edgemoe_runtime.bundle.engine_cache import hash_file
from edgemoe_runtime.bundle.manifest_file import load_manifest
from edgemoe_runtime.bundle.names import (
    ENGINES_FOLDER,
    MANIFEST_FILE,
    SHARED_WEIGHTS_FILE,
    graph_file,
    weights_file,
)
from edgemoe_runtime.bundle.onnx_wire import (
    ExternalTensor,
    GraphSummary,
    GraphTensor,
    read_graph,
)
from edgemoe_runtime.errors import IntegrityError
from edgemoe_runtime.hub_cache import resolve_blob
from edgemoe_runtime.messages import clip

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from edgemoe_runtime.bundle.graph_spec import TensorSpec
    from edgemoe_runtime.bundle.manifest import Manifest

_ALLOWED_KEYS = frozenset({"location", "offset", "length", "checksum"})
_NUMBER = re.compile(r"[0-9]{1,18}")
_MAX_GRAPH_BYTES = (1 << 31) - 1  # 2 GiB: protobuf's own limit
# an EPContext node carries a native blob that a provider would execute
_REFUSED_OPERATORS = frozenset({"com.microsoft::EPContext", "EPContext"})
_REMEDY = "Copy the bundle again from where it was exported, or export it again."


@dataclass(frozen=True)
class VerifiedBundle:
    """A bundle that passed the check.

    Attributes:
        manifest: manifest of the bundle.
        tasks: tasks whose graph and weights were checked.
        hashed_files: number of files whose digest was compared.
        hashed_bytes: size of those files together.
    """

    manifest: Manifest
    tasks: tuple[str, ...]
    hashed_files: int
    hashed_bytes: int


def verify_bundle(
    directory: str | os.PathLike[str],
    *,
    tasks: Collection[str] | None = None,
    hashes: bool = True,
    manifest: Manifest | None = None,
) -> VerifiedBundle:
    """Check a bundle before any engine opens it.

    Args:
        directory: the bundle.
        tasks: tasks to check; None for all. Weights and graphs of other tasks are not hashed.
        hashes: whether to compare digests; everything else is always checked.
        manifest: the bundle's, where it is loaded already: the one that is used is then the
            one that was checked. Files that change after the check are not noticed.

    Returns:
        The manifest, and counts of the files that were hashed.

    Raises:
        ManifestError: when the manifest is missing or malformed.
        RequestError: when the bundle has no such task.
        IntegrityError: when a file is missing, unlisted, altered or unsafe.
    """
    root = Path(directory)
    manifest = load_manifest(root) if manifest is None else manifest
    names = manifest.tasks if tasks is None else tasks
    chosen = tuple(manifest.task(name)[0] for name in names)
    _refuse_unlisted(root, manifest)
    for name, entry in manifest.files.items():
        size = _plain_file(root, name).st_size
        if size != entry.size:
            raise IntegrityError(f"{name} must be {entry.size} bytes, got {size}. {_REMEDY}")
    needed = set(manifest.files)
    for task in manifest.tasks:
        if task not in chosen:
            needed -= {graph_file(task), weights_file(task)}
    for task in chosen:
        summary = _check_graph(root, manifest, task)
        needed |= {dict(tensor.entries)["location"] for tensor in summary.external}
    if hashes:
        for name in sorted(needed):
            actual = hash_file(root / name)
            if actual != manifest.files[name].sha256:
                raise IntegrityError(
                    f"{name} must have the sha256 {manifest.files[name].sha256} of the"
                    f" manifest, got {actual}: it was altered. {_REMEDY}"
                )
    hashed = needed if hashes else set[str]()
    return VerifiedBundle(
        manifest, chosen, len(hashed), sum(manifest.files[name].size for name in hashed)
    )


def _check_graph(root: Path, manifest: Manifest, task: str) -> GraphSummary:
    """Check one task's graph: external data, operators, inputs and outputs.

    Raises:
        IntegrityError: when the graph is malformed, unsafe, or differs from the manifest.
    """
    name = manifest.tasks[task].graph
    if _plain_file(root, name).st_size > _MAX_GRAPH_BYTES:
        raise IntegrityError(f"{name} must be at most {_MAX_GRAPH_BYTES} bytes. {_REMEDY}")
    summary = read_graph((root / name).read_bytes(), name)
    refused = sorted(summary.operators & _REFUSED_OPERATORS)
    if refused:
        raise IntegrityError(f"{name} must not carry native code, got {refused}. {_REMEDY}")
    for tensor in summary.external:
        _check_external(root, manifest, task, tensor)
    _check_ends(name, "input", summary.inputs, manifest.inputs)
    _check_ends(name, "output", summary.outputs, manifest.outputs)
    return summary


def _refuse_unlisted(root: Path, manifest: Manifest) -> None:
    allowed = {*manifest.files, MANIFEST_FILE}
    found: set[str] = set()
    for folder, folders, files in os.walk(root, onerror=_raise_unreadable):
        relative = Path(folder).relative_to(root)
        if relative == Path() and ENGINES_FOLDER in folders:
            folders.remove(ENGINES_FOLDER)
            if (root / ENGINES_FOLDER).is_symlink():
                raise IntegrityError(
                    f"{ENGINES_FOLDER} must be a plain folder, got a symbolic link. {_REMEDY}"
                )
        links = [name for name in folders if (Path(folder) / name).is_symlink()]
        found |= {(relative / name).as_posix() for name in [*files, *links]}
    missing, extra = sorted(allowed - found), sorted(found - allowed)
    if missing:
        raise IntegrityError(
            f"A bundle must hold every listed file, missing {missing}. {_REMEDY}"
        )
    if extra:
        raise IntegrityError(
            f"A bundle must hold only files that its manifest lists, got {extra}. Remove them,"
            " or export the bundle again."
        )


def _raise_unreadable(error: OSError) -> None:
    raise IntegrityError(
        f"A bundle must be a readable directory, got: {error}. Check its path and permissions."
    ) from error


def _plain_file(root: Path, name: str) -> os.stat_result:
    """Return the status of a file that is regular, has one name, and is reached by no link."""
    path = root
    for part in PurePosixPath(name).parts:
        path = path / part
        try:
            status = path.lstat()
        except OSError as error:
            raise IntegrityError(
                f"A bundle must hold every listed file, got {error}. {_REMEDY}"
            ) from error
        if stat.S_ISLNK(status.st_mode):
            blob = resolve_blob(root, path) if path == root / name else None
            if blob is None:
                raise IntegrityError(
                    f"{name} must be no symbolic link, for it could leave the bundle, unless a"
                    " hub's cache made it and it leads into the cache's own folder blobs. Copy"
                    f" the files instead of the links: cp -rL {clip(str(root), 120)} COPY, and"
                    " use the copy."
                )
            path = blob
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise IntegrityError(f"{name} must be a regular file. {_REMEDY}")
    if status.st_nlink > 1:
        raise IntegrityError(
            f"{name} must have one name on disk, got {status.st_nlink} hard links: another"
            " could change it. Copy the bundle with `cp -r` and use the copy."
        )
    return status


def _check_external(root: Path, manifest: Manifest, task: str, tensor: ExternalTensor) -> None:
    where = f"External data of tensor {tensor.name!r} in {task}.onnx"
    keys = [key for key, _ in tensor.entries]
    entries = dict(tensor.entries)
    if len(entries) != len(keys) or not set(keys) <= _ALLOWED_KEYS or "location" not in entries:
        raise IntegrityError(
            f"{where} must have the key location and at most {sorted(_ALLOWED_KEYS)}, each"
            f" once, got {keys}. {_REMEDY}"
        )
    location = entries["location"]
    files = (weights_file(task), SHARED_WEIGHTS_FILE)
    if location not in files or location not in manifest.files:
        # an engine's key covers these two, and engines give other names a meaning of their own
        raise IntegrityError(
            f"{where} must lie in a file of the bundle, {' or '.join(files)}, got"
            f" {location!r}. {_REMEDY}"
        )
    size = _plain_file(root, location).st_size
    numbers: dict[str, int] = {}
    for key in ("offset", "length"):
        text = entries.get(key, "0")
        if not _NUMBER.fullmatch(text):
            raise IntegrityError(f"{where} must have a decimal {key}, got {text!r}. {_REMEDY}")
        numbers[key] = int(text)
    if numbers["offset"] + numbers["length"] > size:
        raise IntegrityError(
            f"{where} must end within {location} ({size} bytes), got offset {numbers['offset']}"
            f" and length {numbers['length']}. {_REMEDY}"
        )


def _check_ends(
    graph: str, kind: str, found: Sequence[GraphTensor], listed: Sequence[TensorSpec]
) -> None:
    names = [tensor.name for tensor in found]
    expected = {spec.name: spec for spec in listed}
    if sorted(names) != sorted(expected):
        different = sorted(set(names) ^ set(expected)) or sorted(names)
        raise IntegrityError(
            f"{graph} must have the {kind}s of the manifest, differs in {different}. {_REMEDY}"
        )
    for tensor in found:
        spec = expected[tensor.name]
        same = tensor.dtype == spec.dtype
        if tensor.shape is not None:
            same = same and len(tensor.shape) == len(spec.shape)
            same = same and all(
                actual == wanted
                for actual, wanted in zip(tensor.shape, spec.shape, strict=True)
                if actual is not None and (isinstance(actual, int) or isinstance(wanted, int))
            )
        if not same:
            raise IntegrityError(
                f"{kind} {tensor.name} of {graph} must be {spec.dtype} {list(spec.shape)} as in"
                f" the manifest, got {tensor.dtype} {tensor.shape}. {_REMEDY}"
            )
