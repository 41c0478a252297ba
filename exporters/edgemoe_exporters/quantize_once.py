"""Quantise what several tasks share once: the search for scales is most of an int4 export.

Tasks have the same backbone and many of the same experts. Inside :func:`remembering`, a
matrix that was quantised before is recognised by the sha256 of its bytes; experts are
looked up one by one, since their stacks differ between tasks.
"""

from __future__ import annotations

import contextlib
import hashlib
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import numpy as np

from edgemoe_exporters.quantize import Quantized, quantize_blocks

if TYPE_CHECKING:
    from collections.abc import Iterator

_Key = tuple[bytes, tuple[int, ...], str, int, int, bool]
_memory: ContextVar[dict[_Key, Quantized] | None] = ContextVar("quantised", default=None)


@contextlib.contextmanager
def remembering() -> Iterator[None]:
    """Keep what is quantised in memory until the block ends.

    Yields:
        Nothing.
    """
    token = _memory.set({})
    try:
        yield
    finally:
        _memory.reset(token)


def quantize(weight: np.ndarray[Any, Any], bits: int, block: int, symmetric: bool) -> Quantized:
    """Quantise along the last axis, as :func:`edgemoe_exporters.quantize.quantize_blocks`.

    Args:
        weight: float ``[rows, columns]`` or ``[experts, rows, columns]``.
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


def _look_up(
    memory: dict[_Key, Quantized],
    matrix: np.ndarray[Any, Any],
    bits: int,
    block: int,
    symmetric: bool,
) -> Quantized:
    content = np.ascontiguousarray(matrix)
    digest = hashlib.sha256(content.data).digest()
    key = (digest, content.shape, content.dtype.str, bits, block, symmetric)
    if key not in memory:
        memory[key] = quantize_blocks(content, bits, block, symmetric)
    return memory[key]
