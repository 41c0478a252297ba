"""Block-wise quantisation of weights to 4 or 8 bits, in onnxruntime's layout.

A block of consecutive weights of a row shares a scale s and a zero point z: a weight is
`(q - z) * s` with an integer q. Scale and zero point of each block are searched for the
smallest squared error, because the range that its extremes span is seldom the best one.
"""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

# Fractions of a block's range that are tried.
_SHRINKS = (1.0, 0.93, 0.86)

_CHUNK = 8192


@dataclass(frozen=True)
class Quantized:
    """A quantised tensor `[..., rows, columns]`.

    Attributes:
        packed: uint8 `[..., rows, columns * bits / 8]`, the first weight in the low bits.
        scales: float32 `[..., rows, blocks]`.
        zero_points: uint8 `[..., rows, ceil(blocks * bits / 8)]`, packed like the weights;
            None for the middle of the range.
    """

    packed: np.ndarray[Any, Any]
    scales: np.ndarray[Any, Any]
    zero_points: np.ndarray[Any, Any] | None


def quantize_blocks(
    weight: np.ndarray[Any, Any], bits: int, block: int, symmetric: bool
) -> Quantized:
    """Quantise along the last axis.

    Args:
        weight: float `[..., rows, columns]`; `block` divides columns.
        bits: 4 or 8.
        block: Weights that share a scale.
        symmetric: Whether the zero point is fixed to the middle of the range.

    Returns:
        The quantised tensor.

    Raises:
        ValueError: `block` does not divide the columns, or `bits` is neither 4 nor 8.
    """
    if bits not in {4, 8} or weight.shape[-1] % block:
        raise ValueError(
            f"bits must be 4 or 8 and block divide the columns, got bits={bits}, "
            f"block={block}, columns={weight.shape[-1]}."
        )
    leading, columns = weight.shape[:-1], weight.shape[-1]
    count = columns // block
    with _pool() as pool:
        parts = list(
            pool.map(
                lambda chunk: _search(
                    torch.tensor(chunk, dtype=torch.float32), bits, symmetric
                ),
                _chunks(weight.reshape(-1, block)),
            )
        )
    levels, scales, zeros = (torch.cat(column).numpy() for column in zip(*parts, strict=True))
    packed = _pack(levels.reshape(*leading, columns), bits)
    zero_points = None if symmetric else _pack(zeros.reshape(*leading, count), bits)
    return Quantized(packed, scales.reshape(*leading, count), zero_points)


@contextlib.contextmanager
def _pool() -> Iterator[ThreadPoolExecutor]:
    """Make threads that take a chunk each: torch's own would share one, and wait for it."""
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads, initializer=lambda: torch.set_num_threads(1)) as pool:
        try:
            yield pool
        finally:
            torch.set_num_threads(threads)


def _chunks(blocks: np.ndarray[Any, Any]) -> Iterator[np.ndarray[Any, Any]]:
    """Split into chunks that stay in a core's cache: several times as fast."""
    for start in range(0, blocks.shape[0], _CHUNK):
        yield blocks[start : start + _CHUNK]


def _search(
    blocks: torch.Tensor, bits: int, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return levels uint8 `[n, block]`, scales float32 `[n]`, zero points uint8 `[n]`."""
    top = (1 << bits) - 1
    candidates = _symmetric(blocks, bits) if symmetric else _asymmetric(blocks, bits)
    best = torch.full((blocks.shape[0],), torch.inf)
    best_scale, best_zero = torch.zeros_like(best), torch.zeros_like(best)
    for scale, zero in candidates:
        centred = _levels(blocks, scale, zero, top).sub_(zero[:, None])
        product = (blocks * centred).sum(dim=1)
        squares = (centred * centred).sum(dim=1)
        # With these levels, least squares gives the best scale, and removes this much error.
        removed = product * product / squares
        fitted = product / squares
        usable = (squares > 0) & (product != 0)
        error = torch.where(usable, -removed, 0.0)
        better = error < best
        best = torch.where(better, error, best)
        best_scale = torch.where(better, torch.where(usable, fitted, scale), best_scale)
        best_zero = torch.where(better, zero, best_zero)
    levels = _levels(blocks, best_scale, best_zero, top)
    return levels.to(torch.uint8), best_scale, best_zero.to(torch.uint8)


def _levels(
    blocks: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, top: int
) -> torch.Tensor:
    return (blocks / scale[:, None]).add_(zero[:, None]).round_().clamp_(0, top)


def _asymmetric(blocks: torch.Tensor, bits: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield scales and zero points around those that the extremes of a block give."""
    top = (1 << bits) - 1
    # Zero is a level whatever the zero point, so the range has to hold it.
    low = blocks.amin(dim=1).clamp(max=0.0)
    high = blocks.amax(dim=1).clamp(min=0.0)
    width = (high - low).clamp(min=1e-30)
    exact = -low / width * top
    for shrink in _SHRINKS if bits == 4 else (1.0,):
        for zero in (exact.floor(), exact.ceil()) if bits == 4 else (exact.round(),):
            yield width * (shrink / top), zero


def _symmetric(blocks: torch.Tensor, bits: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    middle = 1 << (bits - 1)
    extreme = blocks.gather(1, blocks.abs().argmax(dim=1, keepdim=True)).squeeze(1)
    extreme = torch.where(extreme == 0, torch.full_like(extreme, 1e-30), extreme)
    zero = torch.full_like(extreme, float(middle))
    for shrink in _SHRINKS if bits == 4 else (1.0,):
        # The range has one more level below the middle: the extreme falls there.
        yield extreme * (shrink / -middle), zero


def _pack(levels: np.ndarray[Any, Any], bits: int) -> np.ndarray[Any, Any]:
    if bits == 8:
        return levels
    if levels.shape[-1] % 2:
        levels = np.concatenate([levels, np.zeros_like(levels[..., :1])], axis=-1)
    packed: np.ndarray[Any, Any] = levels[..., 0::2] | (levels[..., 1::2] << 4)
    return packed
