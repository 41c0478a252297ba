"""Tensors that lie in safetensors files: known from the headers, read one at a time.

The files are read, not mapped: what is in memory is then what was asked for, whatever a limit
on memory counts, and every tensor starts at an aligned address.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from edgemoe.errors import CheckpointError
from edgemoe_runtime.input_files import parse_strict

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

_LENGTH_BYTES = 8
_CHUNK_BYTES = 1 << 24
_ALIGNMENT_BYTES = 64

DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """One tensor of a safetensors file.

    Attributes:
        name: Its name there.
        file: The file.
        dtype: Its type.
        shape: Its shape.
        begin: Its first byte, counted from the file's start.
    """

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int

    @property
    def stored_nbytes(self) -> int:
        """Size of what the file holds of it, in bytes."""
        return self.nbytes

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def extents(self) -> Iterator[tuple[Path, int]]:
        """Yield each file that it is read from, with the end of its bytes there."""
        yield self.file, self.begin + self.nbytes

    def on_meta(self) -> torch.Tensor:
        """Return a tensor of this type and shape without contents."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")

    def read(self, memory: torch.Tensor | None = None) -> torch.Tensor:
        """Read the contents.

        Args:
            memory: Where to put them, uint8 [nbytes]; new memory by default.

        Returns:
            A tensor in the type that it is stored in.

        Raises:
            CheckpointError: The file has become shorter than its header says.
        """
        if memory is None:
            tensor = torch.empty(self.shape, dtype=self.dtype)
        else:
            tensor = memory.view(self.dtype).reshape(self.shape)
        if not self.nbytes:
            return tensor
        view = as_bytes(tensor)
        with self.file.open("rb", buffering=0) as stream:
            stream.seek(self.begin)
            done = 0
            while done < self.nbytes:
                count = stream.readinto(view[done:])
                if not count:
                    raise self._cut_short()
                done += count
        return tensor

    def read_chunks(self) -> Iterator[bytes]:
        """Read the contents as they are stored.

        Yields:
            Consecutive bytes, at most 16 MiB at a time.

        Raises:
            CheckpointError: The file has become shorter than its header says.
        """
        left = self.nbytes
        with self.file.open("rb", buffering=0) as stream:
            stream.seek(self.begin)
            while left:
                chunk = stream.read(min(left, _CHUNK_BYTES))
                if not chunk:
                    raise self._cut_short()
                left -= len(chunk)
                yield chunk

    def _cut_short(self) -> CheckpointError:
        return CheckpointError(
            f"{self.file} must hold {self.name} up to byte {self.begin + self.nbytes}, got a "
            "shorter file. It changed while it was read: copy the checkpoint again."
        )


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """View a tensor's memory.

    Args:
        tensor: A contiguous tensor with one or more elements.

    Returns:
        Its bytes; writing to them changes the tensor.
    """
    # NumPy has no bfloat16; bytes have no type.
    return memoryview(cast("Any", tensor.detach().reshape(-1).view(torch.uint8).numpy()))


def read_together(stored: Sequence[StoredTensor]) -> list[torch.Tensor]:
    """Read tensors into one piece of memory.

    A piece for each of many experts would be taken from a heap that stays as large as it ever
    was; a large one is given back to the system whole.

    Args:
        stored: The tensors.

    Returns:
        Their contents, each at an aligned address.

    Raises:
        CheckpointError: A file has become shorter than its header says.
    """
    if len(stored) == 1:
        return [stored[0].read()]
    begins = list(
        itertools.accumulate(
            (-(-one.nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES for one in stored), initial=0
        )
    )
    memory = torch.empty(begins[-1], dtype=torch.uint8)
    return [
        one.read(memory[begin : begin + one.nbytes])
        for one, begin in zip(stored, begins, strict=False)
    ]


def read_stored_tensors(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """List the tensors of safetensors files from their headers.

    Args:
        files: Whole files, as `edgemoe.models.safety.check_weights` returns them; of a
            name that two of them have, the last counts, as in transformers.

    Returns:
        The tensors by name.

    Raises:
        CheckpointError: A tensor has a type that torch does not compute with.
    """
    found: dict[str, StoredTensor] = {}
    for file in files:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
            header: dict[str, Any] = parse_strict(stream.read(length))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if entry["dtype"] not in _DTYPES:
                raise CheckpointError(
                    f"{file} must hold tensors of the types {sorted(_DTYPES)}, got "
                    f"{entry['dtype']} for {name}. Use the checkpoint that it was quantised "
                    "from."
                )
            found[name] = StoredTensor(
                name=name,
                file=file,
                dtype=_DTYPES[entry["dtype"]],
                shape=tuple(entry["shape"]),
                begin=_LENGTH_BYTES + length + entry["data_offsets"][0],
            )
    return found
