"""What a decoder layer returned for every batch: in files, and in memory up to a limit.

The files are what an interrupted run goes on from, so all outputs are written; those that fit
the limit are read from memory. Without a directory all outputs stay in memory.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from edgemoe.layerwise.returned import Sharing, map_tensors
from edgemoe.models.stored_tensors import read_stored_tensors
from edgemoe_runtime.input_files import parse_strict

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from edgemoe.layerwise.returned import Outputs

DEFAULT_LIMIT_BYTES = 256 << 20
_CHUNK_BYTES = 32 << 20
_METADATA_KEY = "structures"


class LayerOutputs:
    """Outputs of one decoder layer, in the order of the batches."""

    def __init__(self, directory: Path | None, limit_bytes: int = DEFAULT_LIMIT_BYTES) -> None:
        """Start without outputs.

        Args:
            directory: An existing empty directory for the files; None for no files.
            limit_bytes: How much may stay in memory, where there are files.
        """
        self._directory = directory
        self._limit_bytes = limit_bytes
        self._kept: list[Outputs] = []
        self._kept_bytes = 0
        self._waiting: list[Outputs] = []
        self._waiting_bytes = 0
        self._files: list[tuple[Path, int]] = []
        self._count = 0

    @classmethod
    def reopen(cls, directory: Path) -> LayerOutputs:
        """Open outputs that an earlier process finished.

        Args:
            directory: Where it wrote them.

        Returns:
            The outputs; all are read from files.
        """
        outputs = cls(directory, 0)
        for file in sorted(directory.glob("*.safetensors")):
            count = len(_read_structures(file))
            outputs._files.append((file, count))
            outputs._count += count
        return outputs

    def append(self, outputs: Outputs) -> None:
        """Add the outputs of the next batch.

        Args:
            outputs: What the layer returned; its tensors must not change any more.
        """
        if self._directory is None:
            self._kept.append(outputs)
            return
        sizes: list[int] = []
        map_tensors(outputs, lambda tensor: sizes.append(tensor.nbytes))
        size = sum(sizes)
        if len(self._kept) == self._count and self._kept_bytes + size <= self._limit_bytes:
            self._kept.append(outputs)
            self._kept_bytes += size
        self._count += 1
        self._waiting.append(outputs)
        self._waiting_bytes += size
        # What waits to be written counts as memory too.
        if self._waiting_bytes >= min(_CHUNK_BYTES, max(self._limit_bytes // 4, 1)):
            self._flush()

    def finish(self) -> None:
        """Write what is left, and let it reach the disk."""
        if self._directory is None:
            return
        if self._waiting:
            self._flush()
        descriptor = os.open(self._directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def __iter__(self) -> Iterator[Outputs]:
        yield from self._kept
        passed = 0
        for file, count in self._files:
            if passed + count > len(self._kept):
                for number, outputs in enumerate(_read(file), start=passed):
                    if number >= len(self._kept):
                        yield outputs
            passed += count

    def _flush(self) -> None:
        tensors: dict[str, torch.Tensor] = {}

        def name_of(tensor: torch.Tensor) -> str:
            name = f"{len(tensors):06}"
            # A copy, because two of them may be views of one memory.
            tensors[name] = tensor.clone(memory_format=torch.contiguous_format)
            return name

        structures = [_plain(map_tensors(outputs, name_of)) for outputs in self._waiting]
        assert self._directory is not None
        file = self._directory / f"{len(self._files):06}.safetensors"
        save_file(tensors, str(file), {_METADATA_KEY: json.dumps(structures)})
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
        self._files.append((file, len(self._waiting)))
        self._waiting = []
        self._waiting_bytes = 0


def _plain(structure: Any) -> Any:
    """Make what JSON can hold of the structure of outputs with names for tensors."""
    if isinstance(structure, Sharing):
        shared = {
            name: {key: _plain(value) for key, value in entries.items()}
            for name, entries in structure.shared.items()
        }
        return {"returned": _plain(structure.returned), "shared": shared}
    return [_plain(item) for item in structure] if type(structure) is tuple else structure


def _read_structures(file: Path) -> list[Any]:
    with safe_open(file, framework="numpy") as opened:
        structures: list[Any] = parse_strict(opened.metadata()[_METADATA_KEY])
    return structures


def _read(file: Path) -> Iterator[Outputs]:
    stored = read_stored_tensors([file])

    def rebuild(structure: Any) -> Outputs:
        if structure is None:
            return None
        if isinstance(structure, str):
            return stored[structure].read()
        if isinstance(structure, dict):
            shared = {
                name: {key: rebuild(value) for key, value in entries.items()}
                for name, entries in structure["shared"].items()
            }
            return Sharing(rebuild(structure["returned"]), shared)
        return tuple(rebuild(item) for item in structure)

    for structure in _read_structures(file):
        yield rebuild(structure)
