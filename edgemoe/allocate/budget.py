"""How many experts tokens may use on average."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from edgemoe.errors import AllocationError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgemoe.models.layers.layer import MoeLayer


def two_thirds(layer: MoeLayer) -> int:
    """Return ceil(2 K / 3) of a layer's top_k K."""
    return math.ceil(2 * layer.top_k / 3)


def default_mean(layers: Sequence[MoeLayer]) -> float:
    """Return the mean k of policies that need not round, where none is asked for.

    Args:
        layers: The MoE layers.

    Returns:
        Mean of 2 K / 3 over the layers, each 1 at least.
    """
    return math.fsum(max(1.0, 2 * layer.top_k / 3) for layer in layers) / len(layers)


def check_tokens(tokens: int) -> None:
    """Check how many tokens decide.

    Raises:
        AllocationError: There is none.
    """
    if tokens < 1:
        raise AllocationError(f"tokens must be in [1, inf), got {tokens}.")


def check_mean(mean_k: float, most: Sequence[int]) -> float:
    """Check a mean k.

    Args:
        mean_k: Experts per token and layer.
        most: The most that each MoE layer's tokens may use.

    Returns:
        The same.

    Raises:
        AllocationError: It is below 1 or above what the layers allow.
    """
    top = math.fsum(most) / len(most)
    if not 1 <= mean_k <= top:
        raise AllocationError(
            f"--mean-k must be in [1, {top:g}] experts per token and layer, got {mean_k:g}. "
            "Choose another."
        )
    return mean_k


def spend(mean_k: float, most: Sequence[int]) -> int:
    """Turn a mean into a number of experts over all layers.

    Args:
        mean_k: Experts per token and layer.
        most: The most that each MoE layer's tokens may use.

    Returns:
        Their sum over layers, rounded down so that the mean is not exceeded.

    Raises:
        AllocationError: The mean is out of range.
    """
    # A mean that was written in decimals may lie a rounding below an integer sum.
    return math.floor(check_mean(mean_k, most) * len(most) + 1e-6)


def spend_evenly(mean_k: float, most: Sequence[int]) -> list[int]:
    """Share a mean out so that layers differ by one at most, where they have room.

    Args:
        mean_k: Experts per token and layer.
        most: The most that each MoE layer's tokens may use.

    Returns:
        Experts per token of each layer; the first layers get what is left over.

    Raises:
        AllocationError: The mean is out of range.
    """
    left = spend(mean_k, most) - len(most)
    counts = [1] * len(most)
    while left:
        for layer in [n for n, count in enumerate(counts) if count < most[n]][:left]:
            counts[layer] += 1
            left -= 1
    return counts
