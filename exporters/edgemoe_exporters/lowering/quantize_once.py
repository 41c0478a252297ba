"""Quantise what several tasks share only once: the search for scales dominates an int4 export.

Tasks have the same backbone and many of the same experts. Inside `quantization_cache`, a
matrix that was quantised before is recognised by the sha256 of its bytes; experts are
looked up one by one, since their stacks differ between tasks. Results are cached in a file,
since all of them together are as large as a graph.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import onnx_ir as ir

from edgemoe_exporters.graph.lazy_weights import LazyWeight
from edgemoe_exporters.lowering.quantize import Quantized, quantize_blocks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from edgemoe_exporters.graph.lazy_weights import LatestResult

_Key = tuple[bytes, tuple[int, ...], str, int, int, bool]


class _QuantizationCache:
    """Quantised matrices in a file, by the hash of their content."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._entries: dict[_Key, tuple[int, list[tuple[tuple[int, ...], str]]]] = {}

    def look_up(self, key: _Key, make: Callable[[], Quantized]) -> Quantized:
        if key not in self._entries:
            found = make()
            begin = self._file.seek(0, os.SEEK_END)
            forms = []
            for part in (found.packed, found.scales, found.zero_points):
                if part is not None:
                    self._file.write(np.ascontiguousarray(part).data)
                    forms.append((part.shape, part.dtype.str))
            self._entries[key] = begin, forms
            return found
        begin, forms = self._entries[key]
        self._file.seek(begin)
        parts = []
        for shape, dtype in forms:
            array = np.empty(shape, np.dtype(dtype))
            self._file.readinto(array.reshape(-1).view(np.uint8).data)  # type: ignore[attr-defined]  # a buffered file
            parts.append(array)
        return Quantized(parts[0], parts[1], parts[2] if len(parts) == 3 else None)


_memory: ContextVar[_QuantizationCache | None] = ContextVar("quantised", default=None)


@contextlib.contextmanager
def quantization_cache(directory: Path | None = None) -> Iterator[None]:
    """Cache quantised matrices until the block ends.

    Args:
        directory: Where the file is made; that for temporary files by default. It has no
            name, and is gone with this process in any case.

    Yields:
        Nothing.
    """
    with tempfile.TemporaryFile(dir=directory) as file:
        token = _memory.set(_QuantizationCache(file))
        try:
            yield
        finally:
            _memory.reset(token)


def quantize(weight: np.ndarray[Any, Any], bits: int, block: int, symmetric: bool) -> Quantized:
    """Quantise along the last axis.

    As `lowering.quantize.quantize_blocks` does.

    Args:
        weight: float `[rows, columns]` or `[experts, rows, columns]`.
        bits: 4 or 8.
        block: Weights that share a scale.
        symmetric: Whether the zero point is fixed to the middle of the range.

    Returns:
        The quantised tensor.
    """
    memory = _memory.get()
    if memory is None:
        return quantize_blocks(weight, bits, block, symmetric)
    matrices = weight.reshape(-1, *weight.shape[-2:])
    found = [_look_up(memory, matrix, bits, block, symmetric) for matrix in matrices]
    if weight.ndim == 2:
        return found[0]
    zero_points = [part.zero_points for part in found if part.zero_points is not None]
    return Quantized(
        np.stack([part.packed for part in found]),
        np.stack([part.scales for part in found]),
        np.stack(zero_points) if zero_points else None,
    )


def quantize_later(
    latest: LatestResult, weight: LazyWeight, bits: int, block: int, symmetric: bool
) -> dict[str, LazyWeight]:
    """Quantise a weight when one of its parts is written.

    Args:
        latest: Keeps the parts until another weight is quantised.
        weight: float `[..., rows, columns]`; `block` divides columns.
        bits: As in `quantize`.
        block: As there.
        symmetric: As there.

    Returns:
        The attributes of `lowering.quantize.Quantized` by name; no
        `zero_points` where they are the middle of the range.
    """
    *leading, columns = weight.shape
    count = columns // block
    shapes = {
        "packed": (ir.DataType.UINT8, (*leading, columns * bits // 8)),
        "scales": (ir.DataType.FLOAT, (*leading, count)),
        "zero_points": (ir.DataType.UINT8, (*leading, -(-count * bits // 8))),
    }
    if symmetric:
        shapes.pop("zero_points")

    def part(name: str) -> np.ndarray[Any, Any]:
        quantised = latest.get(
            weight, lambda: quantize(weight.compute(), bits, block, symmetric)
        )
        found: np.ndarray[Any, Any] = getattr(quantised, name)
        return found

    return {
        name: LazyWeight(shape, dtype, partial(part, name))
        for name, (dtype, shape) in shapes.items()
    }


def _look_up(
    memory: _QuantizationCache,
    matrix: np.ndarray[Any, Any],
    bits: int,
    block: int,
    symmetric: bool,
) -> Quantized:
    content = np.ascontiguousarray(matrix)
    digest = hashlib.sha256(content.data).digest()
    key = (digest, content.shape, content.dtype.str, bits, block, symmetric)
    return memory.look_up(key, lambda: quantize_blocks(content, bits, block, symmetric))
