"""Which checkpoint statistics and plans belong to: a hash of what defines its outputs."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch

from edgemoe.models.gguf.paths import SUFFIX as GGUF_SUFFIX
from edgemoe.models.quantised.notes import NOTE_FILES
from edgemoe.models.safety import check_weights
from edgemoe.progress import track

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from edgemoe.resume import WorkDirectory

_CHUNK_BYTES = 1 << 22
# What beside config.json says how weights are stored decides what they are.
_DEFINING = ("config.json", "edgemoe.json", "k_policy.json", *NOTE_FILES)


def fingerprint_checkpoint(path: Path) -> str:
    """Hash the configuration and the weights of a checkpoint.

    Args:
        path: Checkpoint directory.

    Returns:
        SHA-256, in hexadecimal, of the names and the SHA-256 of the files that a model is
        loaded from, ordered by name. Other files beside them do not count.

    Raises:
        CheckpointError: Weights are missing, or are not safetensors.
    """
    return FileHashes(path).fingerprint()


class FileHashes:
    """The hashes behind a fingerprint, each file read once.

    A part of a file may be hashed just before it is used, so that the second reading comes from
    the system's cache, and an interrupted run need not read whole files again.

    Attributes:
        files: The files that define the checkpoint, ordered by name.
    """

    def __init__(
        self,
        path: Path,
        weights: Sequence[Path] | None = None,
        read: Callable[[str], bytes | None] | None = None,
    ) -> None:
        """List the files that define a checkpoint.

        Args:
            path: Checkpoint directory.
            weights: Its weight files, where they were checked already.
            read: Reads a file of settings by its name, where that was done already.

        Raises:
            CheckpointError: Weights are missing, or are not safetensors.
        """
        found = check_weights(path) if weights is None else weights
        # A GGUF file says its settings itself.
        inside = bool(found) and found[0].suffix == GGUF_SUFFIX
        settings = [
            path / name
            for name in (() if inside else _DEFINING)
            if ((path / name).exists() if read is None else read(name) is not None)
        ]
        self.files = sorted([*settings, *found])
        self._read = read
        self._hashes: dict[str, str] = {}
        self._begun: dict[str, tuple[hashlib._Hash, int]] = {}
        self._kept: tuple[WorkDirectory, str] | None = None

    def remember(self, work: WorkDirectory, name: str = "hashes.json") -> None:
        """Take over what an interrupted run has hashed, and keep what this one will.

        Args:
            work: Where both are kept.
            name: In which file.
        """
        self.recall(work.read(name) or {})
        self._kept = (work, name)

    def recall(self, known: Mapping[str, Any]) -> None:
        """Take over hashes of files that have not changed since.

        Args:
            known: What `as_dict` gave before.
        """
        stamps = self.stamps()
        for name, found in known.items():
            if found["stamp"] == stamps.get(name):
                self._hashes[name] = found["sha256"]

    def stamps(self) -> dict[str, list[int]]:
        """Give size in bytes and time of change in nanoseconds of each file, by name."""
        return {
            file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in self.files
        }

    def advance(self, file: Path, end: int | None = None) -> None:
        """Hash a file up to a byte, from where an earlier call stopped.

        Args:
            file: One of the checkpoint's.
            end: The first byte that is left for later; None hashes all of it.
        """
        if file.name in self._hashes:
            return
        if self._read is not None and file.name in _DEFINING:
            self._finish(file, hashlib.sha256(self._read(file.name) or b""))
            return
        digest, begin = self._begun.get(file.name, (hashlib.sha256(), 0))
        with file.open("rb", buffering=0) as stream:
            stream.seek(begin)
            while end is None or begin < end:
                wanted = _CHUNK_BYTES if end is None else min(end - begin, _CHUNK_BYTES)
                chunk = stream.read(wanted)
                if not chunk:
                    self._finish(file, digest)
                    return
                digest.update(chunk)
                begin += len(chunk)
        self._begun[file.name] = (digest, begin)

    def _finish(self, file: Path, digest: hashlib._Hash) -> None:
        self._hashes[file.name] = digest.hexdigest()
        self._begun.pop(file.name, None)
        if self._kept is not None:
            work, name = self._kept
            work.write(name, self.as_dict())

    def fingerprint(self, description: str | None = None) -> str:
        """Hash what is left.

        Args:
            description: What the progress bar says; None shows none.

        Returns:
            What `fingerprint_checkpoint` does.
        """
        whole = hashlib.sha256()
        for file in self.files if description is None else track(self.files, description):
            self.advance(file)
            whole.update(f"{file.name}\0{self._hashes[file.name]}\n".encode())
        return whole.hexdigest()

    def as_dict(self) -> dict[str, Any]:
        """Return the hashes known so far, as JSON values."""
        stamps = self.stamps()
        return {
            name: {"stamp": stamps[name], "sha256": sha256}
            for name, sha256 in sorted(self._hashes.items())
        }


def fingerprint_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """Hash tensors by name, type, shape and bytes.

    Args:
        tensors: For example a state dict.

    Returns:
        SHA-256 in hexadecimal.
    """
    whole = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        whole.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\n".encode())
        # NumPy has no bfloat16; bytes have no type.
        whole.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def hash_file(path: Path) -> str:
    """Hash one file.

    Args:
        path: The file.

    Returns:
        SHA-256 in hexadecimal.
    """
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
