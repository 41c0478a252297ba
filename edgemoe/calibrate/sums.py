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

Every entry is a sum over tokens, so the statistics of two disjoint sets of tokens add up to
those of their union, and addition is exact (`edgemoe.calibrate.exact`): however the
windows are shared out, in whatever order the parts are added, the bits are the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from edgemoe.calibrate.exact import add_exactly, round_to_grid

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from edgemoe.calibrate.exact import Float64, Int64

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
# Counts are integers: float64 adds them exactly up to 2**53. The others need more bits.
REMAINDER_NAMES: tuple[str, ...] = (
    "gate_mass",
    "gate_norm",
    "norm",
    "norm_squared",
    "logit_gram",
)
REMAINDER_SUFFIX = "_remainder"


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
        remainders: For each of `REMAINDER_NAMES` what the exact sum has beyond its
            float64, int64 of the same shape, in units of `exact.UNIT`; zero where it is not
            named.
    """

    tokens: Float64
    count: Float64
    gate_mass: Float64
    gate_norm: Float64
    norm: Float64
    norm_squared: Float64
    logit_gram: Float64
    coactivation: Float64
    remainders: Mapping[str, Int64] = field(default_factory=dict)

    @classmethod
    def zeros(cls, experts: int) -> LayerSums:
        """Return the sums over no token.

        Args:
            experts: Number of experts in the layer.

        Returns:
            The neutral element of addition.
        """
        zeros = {name: np.zeros(sum_shape(name, experts)) for name in SUM_NAMES}
        return cls(**zeros, remainders={})

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
            indices: Experts, int64 [tokens, top_k] in [0, experts]; the id `experts` marks
                an unused slot.
            norms: Norms of the experts' outputs, float64 [tokens, top_k].

        Returns:
            The eight sums, each rounded to a multiple of `exact.UNIT`.

        Raises:
            StatisticsError: A sum is not finite, or too large for exact addition.
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

        sums = {
            "gate_mass": per_expert(gates),
            "gate_norm": per_expert(gates * norms),
            "norm": per_expert(norms),
            "norm_squared": per_expert(norms**2),
            "logit_gram": logits.T @ logits,
        }
        return cls(
            tokens=np.asarray(float(tokens)),
            count=chosen.sum(axis=0),
            coactivation=chosen.T @ chosen,
            **{name: round_to_grid(value, name) for name, value in sums.items()},
            remainders={},
        )

    def __add__(self, other: LayerSums) -> LayerSums:
        """Add exactly.

        Args:
            other: The sums over other tokens.

        Returns:
            The sums over both.

        Raises:
            StatisticsError: A sum is too large for exact addition.
        """
        values, remainders = {}, {}
        for name in SUM_NAMES:
            one, two = getattr(self, name), getattr(other, name)
            if name in REMAINDER_NAMES:
                values[name], remainders[name] = add_exactly(
                    (one, self.remainder(name)), (two, other.remainder(name)), name
                )
            else:
                values[name] = np.asarray(one + two)
        return LayerSums(**values, remainders=remainders)

    def remainder(self, name: str) -> Int64:
        """Return what an exact sum has beyond its float64.

        Args:
            name: One of `REMAINDER_NAMES`.

        Returns:
            int64 of the sum's shape, in units of `exact.UNIT`.
        """
        found = self.remainders.get(name)
        return np.zeros(getattr(self, name).shape, np.int64) if found is None else found

    def as_dict(self) -> Mapping[str, Float64]:
        """Return the sums by name, in the order of the definition."""
        return {name: getattr(self, name) for name in SUM_NAMES}

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Return all that the sums are, to be stored.

        Returns:
            The sums by name, float64; their remainders under `<name>_remainder`, int64.
        """
        arrays: dict[str, NDArray[Any]] = {}
        for name, value in self.as_dict().items():
            arrays[name] = np.array(value, dtype=np.float64, order="C")
            if name in REMAINDER_NAMES:
                remainder = np.array(self.remainder(name), dtype=np.int64, order="C")
                arrays[name + REMAINDER_SUFFIX] = remainder
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> LayerSums:
        """Put sums together from what `to_arrays` returned.

        Args:
            arrays: Arrays by name.

        Returns:
            The sums.
        """
        return cls(
            **{name: arrays[name] for name in SUM_NAMES},
            remainders={name: arrays[name + REMAINDER_SUFFIX] for name in REMAINDER_NAMES},
        )


def array_types(experts: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return what `LayerSums.to_arrays` holds.

    Args:
        experts: Number of experts in the layer.

    Returns:
        Type and shape of every array by name.
    """
    types = {name: ("float64", sum_shape(name, experts)) for name in SUM_NAMES}
    for name in REMAINDER_NAMES:
        types[name + REMAINDER_SUFFIX] = ("int64", sum_shape(name, experts))
    return types


def sum_shape(name: str, experts: int) -> tuple[int, ...]:
    """Return the shape of a sum.

    Args:
        name: One of `SUM_NAMES`.
        experts: Number of experts in the layer.

    Returns:
        `()`, `(experts,)` or `(experts, experts)`.
    """
    return (experts,) * _RANKS[name]
