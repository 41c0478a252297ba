"""Block-wise quantisation of weights to 4 or 8 bits, in onnxruntime's layout.

A block of consecutive weights of a row shares a scale s and a zero point z: a weight is
``(q - z) * s`` with an integer q. Scale and zero point of each block are searched for the
smallest squared error, because the range that its extremes span is seldom the best one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

# Fractions of a block's range that are tried.
_SHRINKS = (1.0, 0.95, 0.9, 0.85)


@dataclass(frozen=True)
class Quantized:
    """A quantised tensor ``[..., rows, columns]``.

    Attributes:
        packed: uint8 ``[..., rows, columns * bits / 8]``, the first weight in the low bits.
        scales: float32 ``[..., rows, blocks]``.
        zero_points: uint8 ``[..., rows, ceil(blocks * bits / 8)]``, packed like the weights;
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
        weight: float ``[..., rows, columns]``; ``block`` divides columns.
        bits: 4 or 8.
        block: Weights that share a scale.
        symmetric: Whether the zero point is fixed to the middle of the range.

    Returns:
        The quantised tensor.

    Raises:
        ValueError: ``block`` does not divide the columns, or ``bits`` is neither 4 nor 8.
    """
    if bits not in {4, 8} or weight.shape[-1] % block:
        raise ValueError(
            f"bits must be 4 or 8 and block divide the columns, got bits={bits}, "
            f"block={block}, columns={weight.shape[-1]}."
        )
    blocks = torch.from_numpy(np.ascontiguousarray(weight, dtype=np.float32))
    blocks = blocks.reshape(-1, block)
    search = _search_symmetric if symmetric else _search_asymmetric
    levels, scales, zeros = search(blocks, bits)
    leading = weight.shape[:-1]
    columns = weight.shape[-1]
    packed = _pack(levels.reshape(*leading, columns).numpy(), bits)
    zero_points = None
    if not symmetric:
        zero_points = _pack(zeros.reshape(*leading, columns // block).numpy(), bits)
    return Quantized(packed, scales.reshape(*leading, columns // block).numpy(), zero_points)


def dequantize_blocks(quantized: Quantized, bits: int) -> np.ndarray[Any, Any]:
    """Undo :func:`quantize_blocks`.

    Args:
        quantized: What it returned.
        bits: What it was given.

    Returns:
        float32 ``[..., rows, columns]``.
    """
    levels = _unpack(quantized.packed, bits).astype(np.float32)
    scales = quantized.scales
    blocks = levels.reshape(*scales.shape, -1)
    if quantized.zero_points is None:
        zeros = np.full(scales.shape, 1 << (bits - 1), dtype=np.float32)
    else:
        zeros = _unpack(quantized.zero_points, bits)[..., : scales.shape[-1]]
        zeros = zeros.astype(np.float32)
    values: np.ndarray[Any, Any] = (blocks - zeros[..., None]) * scales[..., None]
    return values.reshape(levels.shape)


def _search_asymmetric(
    blocks: torch.Tensor, bits: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    top = (1 << bits) - 1
    # Zero must be a level, as it is of every zero point in [0, top].
    low = blocks.amin(dim=1).clamp(max=0.0)
    high = blocks.amax(dim=1).clamp(min=0.0)
    best = _Best(blocks)
    for shrink in _SHRINKS if bits == 4 else _SHRINKS[:1]:
        scale = ((high - low) * (shrink / top)).clamp(min=torch.finfo(torch.float32).tiny)
        exact = -low * shrink / scale
        for zero in {4: (exact.floor(), exact.ceil())}.get(bits, (exact.round(),)):
            best.offer(scale, zero.clamp(0, top), top)
    return best.levels, best.scale, best.zero


def _search_symmetric(
    blocks: torch.Tensor, bits: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    top, middle = (1 << bits) - 1, 1 << (bits - 1)
    index = blocks.abs().argmax(dim=1, keepdim=True)
    extreme = blocks.gather(1, index).squeeze(1)
    extreme = torch.where(extreme == 0, torch.full_like(extreme, 1e-30), extreme)
    best = _Best(blocks)
    zero = torch.full_like(extreme, float(middle))
    for shrink in _SHRINKS if bits == 4 else _SHRINKS[:1]:
        # The range has one more level below the middle: let the extreme fall there.
        best.offer(extreme * (shrink / -middle), zero, top)
    return best.levels, best.scale, best.zero


class _Best:
    """The best scale and zero point of each block so far."""

    def __init__(self, blocks: torch.Tensor) -> None:
        self.blocks = blocks
        self.error = torch.full((blocks.shape[0],), torch.inf)
        self.scale = torch.zeros(blocks.shape[0])
        self.zero = torch.zeros(blocks.shape[0], dtype=torch.uint8)
        self.levels = torch.zeros(blocks.shape, dtype=torch.uint8)

    def offer(self, scale: torch.Tensor, zero: torch.Tensor, top: int) -> None:
        column = zero[:, None]
        levels = (self.blocks / scale[:, None]).add_(column).round_().clamp_(0, top)
        centred = levels - column
        # The best scale for these levels, by least squares.
        squares = (centred * centred).sum(dim=1)
        fitted = (self.blocks * centred).sum(dim=1) / squares
        scale = torch.where((squares > 0) & (fitted != 0), fitted, scale)
        error = (centred.mul_(scale[:, None]).sub_(self.blocks)).square_().sum(dim=1)
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.scale = torch.where(better, scale, self.scale)
        self.zero = torch.where(better, zero.to(torch.uint8), self.zero)
        self.levels = torch.where(better[:, None], levels.to(torch.uint8), self.levels)


def _pack(levels: np.ndarray[Any, Any], bits: int) -> np.ndarray[Any, Any]:
    if bits == 8:
        return levels
    if levels.shape[-1] % 2:
        levels = np.concatenate([levels, np.zeros_like(levels[..., :1])], axis=-1)
    packed: np.ndarray[Any, Any] = levels[..., 0::2] | (levels[..., 1::2] << 4)
    return packed


def _unpack(packed: np.ndarray[Any, Any], bits: int) -> np.ndarray[Any, Any]:
    if bits == 8:
        return packed
    pairs = np.stack([packed & 15, packed >> 4], axis=-1)
    return pairs.reshape(*packed.shape[:-1], -1)
