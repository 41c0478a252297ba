"""What one MoE layer's statistics are: eight sums over tokens, in float64.

For token t of T, with router logits z_t [E] (before scores and correction bias), the set
A_t of experts that it is routed to, their weights w_tj as the block applies them, and their
outputs f_j(x_t) before weighting, let g_tj = w_tj / sum_{i in A_t} w_ti: the weights
renormalised over the top-k, so that a routed scaling factor cancels. Then ::

    tokens           T
    count        [E] sum_t 1[j in A_t]
    gate_mass    [E] sum_t 1[j in A_t] g_tj
    gate_norm    [E] sum_t 1[j in A_t] g_tj ||f_j(x_t)||_2
    norm         [E] sum_t 1[j in A_t] ||f_j(x_t)||_2
    norm_squared [E] sum_t 1[j in A_t] ||f_j(x_t)||_2^2
    logit_gram   [E, E] sum_t z_ti z_tj
    coactivation [E, E] sum_t 1[i in A_t] 1[j in A_t]

Every entry is a sum over tokens, so the statistics of two disjoint sets of tokens add up
to those of their union: exactly for the counts (integers below 2**53), up to the rounding
of a float64 addition for the rest.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

Float64: TypeAlias = "NDArray[np.float64]"

_RANKS: dict[str, int] = {
    "tokens": 0,
    "count": 1,
    "gate_mass": 1,
    "gate_norm": 1,
    "norm": 1,
    "norm_squared": 1,
    "logit_gram": 2,
    "coactivation": 2,
}
SUM_NAMES: tuple[str, ...] = tuple(_RANKS)


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerSums:
    """The eight sums of one layer, as the module's docstring defines them.

    Attributes:
        tokens: float64 [].
        count: float64 [experts].
        gate_mass: float64 [experts].
        gate_norm: float64 [experts].
        norm: float64 [experts].
        norm_squared: float64 [experts].
        logit_gram: float64 [experts, experts].
        coactivation: float64 [experts, experts].
    """

    tokens: Float64
    count: Float64
    gate_mass: Float64
    gate_norm: Float64
    norm: Float64
    norm_squared: Float64
    logit_gram: Float64
    coactivation: Float64

    @classmethod
    def zeros(cls, experts: int) -> LayerSums:
        """Return the sums over no token.

        Args:
            experts: Number of experts in the layer.

        Returns:
            The neutral element of addition.
        """
        return cls(**{name: np.zeros(sum_shape(name, experts)) for name in SUM_NAMES})

    @classmethod
    def of_tokens(
        cls,
        logits: Float64,
        weights: Float64,
        indices: NDArray[np.int64],
        norms: Float64,
    ) -> LayerSums:
        """Sum over tokens.

        Args:
            logits: Router logits, float64 [tokens, experts].
            weights: Weights as the block applies them, float64 [tokens, top_k].
            indices: Experts, int64 [tokens, top_k] in [0, experts]; the id ``experts`` marks
                an unused slot.
            norms: Norms of the experts' outputs, float64 [tokens, top_k].

        Returns:
            The eight sums.
        """
        tokens, experts = logits.shape
        used = indices < experts
        weights = np.where(used, weights, 0.0)
        mass = weights.sum(axis=1, keepdims=True)
        gates = np.divide(weights, mass, out=np.zeros_like(weights), where=mass > 0)
        chosen = np.zeros((tokens, experts + 1))
        np.put_along_axis(chosen, indices, 1.0, axis=1)
        chosen = chosen[:, :experts]

        def per_expert(values: Float64) -> Float64:
            # bincount adds in token order, so the result does not depend on threads.
            return np.bincount(indices[used], values[used], minlength=experts).astype(
                np.float64
            )

        return cls(
            tokens=np.asarray(float(tokens)),
            count=chosen.sum(axis=0),
            gate_mass=per_expert(gates),
            gate_norm=per_expert(gates * norms),
            norm=per_expert(norms),
            norm_squared=per_expert(norms**2),
            logit_gram=logits.T @ logits,
            coactivation=chosen.T @ chosen,
        )

    def __add__(self, other: LayerSums) -> LayerSums:
        return LayerSums(
            **{
                name: np.asarray(getattr(self, name) + getattr(other, name))
                for name in SUM_NAMES
            }
        )

    def as_dict(self) -> Mapping[str, Float64]:
        """Return the sums by name, in the order of the definition."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def sum_shape(name: str, experts: int) -> tuple[int, ...]:
    """Return the shape of a sum.

    Args:
        name: One of :data:`SUM_NAMES`.
        experts: Number of experts in the layer.

    Returns:
        ``()``, ``(experts,)`` or ``(experts, experts)``.
    """
    return (experts,) * _RANKS[name]
