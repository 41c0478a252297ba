"""Cumulative router probability of a token before each of its experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgemoe.errors import AllocationError
from edgemoe.models.routing.routers import probability_before, select

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from edgemoe.oracle.oracle import LayerOracle, LayerView

_STEPS = 40


def cumulative_of(oracle: LayerOracle, most: Sequence[int]) -> list[NDArray[np.float32]]:
    """Measure the cumulative router probability before each expert that a token may use.

    Args:
        oracle: The model and the tokens.
        most: Most experts of a token, for each MoE layer.

    Returns:
        For each MoE layer float32 [tokens, most], ascending, the first column 0: a token uses
        the experts whose number here is below p.

    Raises:
        AllocationError: A router follows no known rule.
        StreamingError: The family cannot be run layer by layer.
    """
    views = oracle.walk("weigh experts")
    return [_before(view, slots) for view, slots in zip(views, most, strict=True)]


def find_share(cumulative: Sequence[NDArray[np.float32]], mean_k: float) -> float:
    """Find the smallest share with which tokens use as many experts as asked.

    Args:
        cumulative: What `cumulative_of` returns.
        mean_k: Experts per token and layer.

    Returns:
        p, in (0, 1]; 1 where no share is enough.
    """
    low, high = 0.0, 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if mean_of(cumulative, middle) >= mean_k:
            high = middle
        else:
            low = middle
    return high


def mean_of(cumulative: Sequence[NDArray[np.float32]], share: float) -> float:
    """Count the experts that a share takes.

    Args:
        cumulative: What `cumulative_of` returns.
        share: p, in (0, 1].

    Returns:
        Experts per token and layer.
    """
    return float(np.mean([(layer < share).sum(axis=1).mean() for layer in cumulative]))


def _before(view: LayerView, slots: int) -> NDArray[np.float32]:
    layer, logits = view.layer, view.routing.logits
    if layer.rule is None:
        raise AllocationError(
            "a share of mass must be of routers that follow a known rule, got one that does "
            f"not in layer {layer.index}. Use --policy alloc-l."
        )
    chosen = select(logits, layer.correction_bias, layer.rule, slots).indices
    found: NDArray[np.float32] = probability_before(logits, chosen, layer.rule).cpu().numpy()
    return found
