"""Weights of a quantised checkpoint as tensors of a plain one, made when they are read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from edgemoe.errors import CheckpointError
from edgemoe.models.quantised.decoding import RULES
from edgemoe.models.stored_tensors import StoredTensor, as_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from edgemoe.models.quantised.form import Piece


@dataclass(frozen=True, kw_only=True)
class QuantisedTensor(StoredTensor):
    """One tensor of a plain checkpoint, made of what a quantised one stores.

    Attributes:
        piece: How it is made.
        parts: The stored tensors, by what they are to the arithmetic.
    """

    piece: Piece
    parts: Mapping[str, StoredTensor]

    @property
    def stored_nbytes(self) -> int:
        """Size of its parts in the files in bytes."""
        return sum(part.nbytes for part in self.parts.values())

    def extents(self) -> Iterator[tuple[Path, int]]:
        """Yield each file that it is read from, with the end of its bytes there."""
        for part in self.parts.values():
            yield part.file, part.begin + part.nbytes

    def read(self, memory: torch.Tensor | None = None) -> torch.Tensor:
        """Read the contents, dequantised; of a stack one expert at a time.

        Args:
            memory: Where to put them, uint8 [nbytes]; new memory by default.

        Returns:
            A tensor of type `dtype`.

        Raises:
            CheckpointError: A file has become shorter than its header says, or what the parts
                hold does not fit together.
        """
        if memory is None:
            tensor = torch.empty(self.shape, dtype=self.dtype)
        else:
            tensor = memory.view(self.dtype).reshape(self.shape)
        if self.piece.is_stack:
            for expert in range(self.shape[0]):
                parts = {role: _of(part, expert) for role, part in self.parts.items()}
                tensor[expert] = self._make(parts)
        else:
            tensor.copy_(self._make({role: part.read() for role, part in self.parts.items()}))
        return tensor

    def _make(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        try:
            return RULES[self.piece.rule](parts, self.piece.settings, self.dtype)
        except ValueError as error:
            raise CheckpointError(
                f"the parts of {self.name} in {self.file} must fit together, got {error}. Copy "
                "the checkpoint again."
            ) from error

    def read_chunks(self) -> Iterator[bytes]:
        """Read the contents as a plain checkpoint stores them.

        Yields:
            All bytes at once: a tensor is dequantised whole.
        """
        yield bytes(as_bytes(self.read()))


def _of(part: StoredTensor, expert: int) -> torch.Tensor:
    """Read one expert's share of a part."""
    shape = part.shape[1:]
    size = part.nbytes // part.shape[0]
    return replace(part, shape=shape, begin=part.begin + expert * size).read()
