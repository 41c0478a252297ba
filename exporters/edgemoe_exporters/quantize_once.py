"""Quantise what several tasks share once: the search for scales is most of an int4 export.

Tasks have the same backbone and many of the same experts. Inside :func:`remembering`, a
matrix that was quantised before is recognised by the sha256 of its bytes; experts are
looked up one by one, since their stacks differ between tasks.
"""

from __future__ import annotations

import contextlib
import hashlib
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from edgemoe_exporters.deferred import Deferred
from edgemoe_exporters.quantize import Quantized, quantize_blocks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from edgemoe_exporters.deferred import Latest

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


def quantize_later(
    latest: Latest[Quantized], weight: Deferred, bits: int, block: int, symmetric: bool
) -> dict[str, Deferred]:
    """Quantise a weight when one of its parts is written.

    Args:
        latest: Keeps the parts until another weight is quantised.
        weight: float ``[..., rows, columns]``; ``block`` divides columns.
        bits: As in :func:`quantize`.
        block: As there.
        symmetric: As there.

    Returns:
        The attributes of :class:`edgemoe_exporters.quantize.Quantized` by name; no
        ``zero_points`` where they are the middle of the range.
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
        name: Deferred(shape, dtype, partial(part, name))
        for name, (dtype, shape) in shapes.items()
    }


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
