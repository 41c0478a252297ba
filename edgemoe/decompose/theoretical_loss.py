"""Layers that lose more at the same rank keep more: SVD-LLM v2's allocation.

https://arxiv.org/abs/2503.12340. Within a group of matrices of one type, here the first
products of all layers and the second products of all layers, matrix i of `len` with the
theoretical loss L_i = ||W_i X - SVD_k(W_i X)||_F at equal shares loses the fraction ::

    (1 - ratio) * len * L'_i / sum_i L'_i,    L'_i = 1 / log(L_i)

of its parameters. A layer's experts are one matrix here, since they are stored with one rank:
their squared losses add up. X is what reaches the layer when nothing is factored. The formula
has no meaning for L_i <= 1, and what L_i is depends on how many tokens were read; losses below
e count as e, and no product keeps less than a tenth of `ratio`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from edgemoe.decompose.walk import FactoringTask

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgemoe.decompose.layer_factors import LayerFactors
    from edgemoe.decompose.walk import Prepare
    from edgemoe.layerwise.provider import LayerProvider
    from edgemoe.models.layers.layer import MoeLayer
    from edgemoe.plans.plan import Plan

_LEAST = 0.1


def kept_fractions(losses: Sequence[float], ratio: float) -> tuple[float, ...]:
    """Share what is kept out among matrices of one type and size.

    Args:
        losses: L_i of each, in [0, inf).
        ratio: Fraction to keep on average, in (0, 1].

    Returns:
        Fraction of its parameters that each keeps, in (0, 1].
    """
    inverse = 1 / np.log(np.maximum(np.asarray(losses, np.float64), np.e))
    removed = (1 - ratio) * inverse / inverse.mean()
    return tuple(np.maximum(1 - removed, _LEAST * ratio).tolist())


def measure_losses(
    provider: LayerProvider, plan: Plan, prepare: Prepare
) -> tuple[tuple[float, float], ...]:
    """Factor every layer at the ranks of a plan, and go on as if it had stayed whole.

    Args:
        provider: The model.
        plan: A plan with ranks for every layer.
        prepare: As in `edgemoe.decompose.walk.FactoringTask`.

    Returns:
        For each layer L of the first and of the second products.

    Raises:
        StreamingError: The family cannot be run layer by layer.
    """
    task = _Losses(provider, plan, prepare, go_on_factored=False)
    task.run("measure what layers lose")
    return tuple(task.found)


class _Losses(FactoringTask):
    """Keeps what each layer loses, and not its factors."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.found: list[tuple[float, float]] = []

    def take(self, layer: MoeLayer, kept: object, factors: LayerFactors) -> None:
        del layer, kept
        up, down = factors.lost
        self.found.append((up**0.5, down**0.5))
