"""Write safetensors shards tensor by tensor, so that no shard need fit in memory.

What each shard holds is laid out before the first byte is written: names, order and sizes
follow from shapes alone, so the same checkpoint always has the same bytes, and an interrupted
run knows which shards are missing.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

from edgemoe.models.stored_tensors import DTYPE_NAMES, as_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    import torch

    from edgemoe.models.stored_tensors import StoredTensor

DEFAULT_SHARD_BYTES = 4_000_000_000
INDEX = "model.safetensors.index.json"
_ALIGNMENT_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class PlannedTensor:
    """A tensor of the checkpoint to be written.

    Attributes:
        name: Its name.
        dtype: Its type.
        shape: Its shape.
        layer: Decoder layer that it belongs to; None for no layer.
        source: Where its bytes are copied from; None where it is computed.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    layer: int | None
    source: StoredTensor | None = None

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One file of the checkpoint to be written.

    Attributes:
        name: File name.
        tensors: What it holds, ordered by layer.
    """

    name: str
    tensors: tuple[PlannedTensor, ...]

    @property
    def nbytes(self) -> int:
        """Size of its tensors in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors)


def lay_out(tensors: Sequence[PlannedTensor], max_bytes: int) -> list[Shard]:
    """Divide tensors into shards.

    A decoder layer lies in one shard wherever it fits, because layers are computed whole.

    Args:
        tensors: All of them, ordered by layer.
        max_bytes: Size that a shard exceeds only if one tensor does.

    Returns:
        The shards; a single one is named as transformers names it.
    """
    layer_bytes: dict[int | None, int] = {}
    for tensor in tensors:
        layer_bytes[tensor.layer] = layer_bytes.get(tensor.layer, 0) + tensor.nbytes
    parts: list[list[PlannedTensor]] = [[]]
    filled = 0
    previous: int | None = None
    for tensor in tensors:
        begins_layer = tensor.layer is not None and tensor.layer != previous
        needed = layer_bytes[tensor.layer] if begins_layer else tensor.nbytes
        if needed > max_bytes:
            needed = tensor.nbytes
        if parts[-1] and filled + needed > max_bytes:
            parts.append([])
            filled = 0
        parts[-1].append(tensor)
        filled += tensor.nbytes
        previous = tensor.layer
    if len(parts) == 1:
        return [Shard(name="model.safetensors", tensors=tuple(parts[0]))]
    return [
        Shard(
            name=f"model-{number:05}-of-{len(parts):05}.safetensors",
            tensors=tuple(part),
        )
        for number, part in enumerate(parts, start=1)
    ]


def write_index(shards: Sequence[Shard], directory: Path) -> None:
    """Write which shard holds which tensor; a single shard needs no index.

    Args:
        shards: All shards.
        directory: Where they are.
    """
    if len(shards) == 1:
        return
    tensors = [tensor for shard in shards for tensor in shard.tensors]
    content = {
        "metadata": {
            "total_parameters": sum(math.prod(tensor.shape) for tensor in tensors),
            "total_size": sum(tensor.nbytes for tensor in tensors),
        },
        "weight_map": {tensor.name: shard.name for shard in shards for tensor in shard.tensors},
    }
    text = json.dumps(content, indent=2, sort_keys=True) + "\n"
    (directory / INDEX).write_text(text, encoding="utf-8")


class ShardWriter:
    """Writes one safetensors file, its tensors in any order."""

    def __init__(self, stream: IO[bytes], shard: Shard) -> None:
        """Write the header.

        Args:
            stream: A new file, open for writing.
            shard: What it will hold.
        """
        self._stream = stream
        # Wide types first: then every tensor is aligned to its own type.
        ordered = sorted(shard.tensors, key=lambda tensor: -tensor.dtype.itemsize)
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offsets: dict[str, int] = {}
        end = 0
        for tensor in ordered:
            offsets[tensor.name] = end
            end += tensor.nbytes
            header[tensor.name] = {
                "dtype": DTYPE_NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [offsets[tensor.name], end],
            }
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % _ALIGNMENT_BYTES)
        stream.write(len(text).to_bytes(8, "little"))
        stream.write(text)
        self._begin = 8 + len(text)
        self._offsets = offsets

    def copy(self, tensor: PlannedTensor, chunks: Iterable[bytes | memoryview]) -> None:
        """Write a tensor's bytes.

        Args:
            tensor: Which.
            chunks: Its bytes, in order.
        """
        self._stream.seek(self._begin + self._offsets[tensor.name])
        for chunk in chunks:
            self._stream.write(chunk)

    def write(self, tensor: PlannedTensor, content: torch.Tensor) -> None:
        """Write a tensor.

        Args:
            tensor: Which.
            content: Of the planned type and shape.

        Raises:
            ValueError: It has another type or shape.
        """
        if (content.dtype, tuple(content.shape)) != (tensor.dtype, tensor.shape):
            raise ValueError(
                f"{tensor.name} must be {tensor.dtype} {tensor.shape}, got {content.dtype} "
                f"{tuple(content.shape)}."
            )
        if content.numel():
            self.copy(tensor, [as_bytes(content.contiguous())])
