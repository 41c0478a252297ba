"""How a budget of parameters becomes ranks.

A product W [m, n] of an expert keeps k (m + n) of its m n parameters at rank k. All experts of
a layer are stored at the layer's largest rank, smaller ones padded with zeros, so that is what
the budget is charged with. Shares:

- Every product keeps the same fraction of its own parameters, the rule of SVD-LLM
  (https://arxiv.org/abs/2503.12340, k = m n fraction / (m + n)), so first and second products
  get the same share, not the same rank; unless shares are weighed, see
  `edgemoe.decompose.theoretical_loss`.
- Within a layer i with M'_i experts, MoE-I² (https://arxiv.org/abs/2411.01016) gives
  expert j ::

      R_ij = floor((I_ij + eps)^alpha / sum_j (I_ij + eps)^alpha * R_a * M'_i),    alpha = 0.15

  with its importance I_ij and the mean rank R_a, one number for all layers. R_a follows from
  the budget: the largest R_ij is what the layer stores. eps, which the paper leaves open, is
  a hundredth of the layer's mean importance. No expert gets rank 0.

Whole numbers do not divide a budget evenly: ranks are raised one step at a time, always where a
product is furthest behind its share (highest averages), until no step fits any more.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgemoe.errors import PlanError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

_ALPHA = 0.15
_FLOOR = 0.01
# Steps of several ranks may leave at most this share of the parameters unused.
_UNUSED = 0.01


@dataclass(frozen=True, kw_only=True)
class Product:
    """One of the two products of all experts of a layer.

    Attributes:
        experts: How many experts share its rank.
        rows: m, outputs.
        columns: n, inputs.
        weight: Fraction of its parameters to keep, as compared with other products, in
            (0, inf).
    """

    experts: int
    rows: int
    columns: int
    weight: float = 1.0

    @property
    def parameters(self) -> int:
        """Parameters of the whole matrices."""
        return self.experts * self.rows * self.columns

    @property
    def per_rank(self) -> int:
        """Parameters of the factors for each rank."""
        return self.experts * (self.rows + self.columns)

    @property
    def most(self) -> int:
        """The largest rank at which factors are no larger than the matrix."""
        return self.rows * self.columns // (self.rows + self.columns)

    @property
    def target(self) -> float:
        """What its rank is proportional to."""
        return self.weight * self.rows * self.columns / (self.rows + self.columns)


def share_out(
    products: Sequence[Product], ratio: float, *, multiple: int = 1, fixed: int = 0
) -> tuple[int, ...]:
    """Choose the ranks that products are stored with.

    Args:
        products: All products of all layers.
        ratio: Fraction of all parameters, fixed ones included, that may be stored, in (0, 1].
        multiple: Ranks are multiples of it where that leaves at most a hundredth of `ratio`
            unused; of half of it otherwise, of a quarter, and so on.
        fixed: Parameters that stay, such as biases.

    Returns:
        One rank per product; together at most `ratio`, and no single one can be raised by
        a step.

    Raises:
        PlanError: The ratio is not in (0, 1], below what rank 1 takes, or the multiple is 0.
    """
    if not 0 < ratio <= 1:
        raise PlanError(
            "--param-ratio must be the fraction of the experts' parameters to keep, in (0, 1], "
            f"got {ratio}. At more than 1 factors are larger than the matrices."
        )
    if multiple < 1:
        raise PlanError(f"multiple must be an integer in [1, inf), got {multiple}.")
    before = fixed + sum(product.parameters for product in products)
    budget = math.floor(ratio * before) - fixed
    least = sum(product.per_rank for product in products)
    if any(product.most < 1 for product in products):
        raise PlanError("experts must have matrices, got some with one row or one column.")
    if least > budget:
        bound = math.ceil((least + fixed) / before * 1e4) / 1e4
        raise PlanError(
            f"--param-ratio must be in [{bound}, 1] for these experts, because rank 1 takes "
            f"that much, got {ratio}. Keep more, or drop experts with `edgemoe prune` first."
        )
    steps = [multiple]
    while steps[-1] > 1:
        steps.append(steps[-1] // 2)
    tried = [_raise_ranks(products, budget, step) for step in steps]
    enough = (1 - _UNUSED) * _size(products, tried[-1])
    return next(ranks for ranks in tried if _size(products, ranks) >= enough)


def _raise_ranks(products: Sequence[Product], budget: int, step: int) -> tuple[int, ...]:
    most = [product.most // step * step for product in products]
    ranks = [step if limit else 0 for limit in most]
    left = budget - _size(products, ranks)
    if left < 0 or 0 in ranks:
        return (0,) * len(products)
    waiting = [((ranks[n] + step) / product.target, n) for n, product in enumerate(products)]
    heapq.heapify(waiting)
    while waiting:
        _, number = heapq.heappop(waiting)
        cost = step * products[number].per_rank
        # Money only gets less, so what does not fit now never will.
        if cost <= left and ranks[number] + step <= most[number]:
            ranks[number] += step
            left -= cost
            behind = (ranks[number] + step) / products[number].target
            heapq.heappush(waiting, (behind, number))
    return tuple(ranks)


def _size(products: Sequence[Product], ranks: Sequence[int]) -> int:
    return sum(product.per_rank * rank for product, rank in zip(products, ranks, strict=True))


def spread(stored: int, importance: Sequence[float]) -> tuple[int, ...]:
    """Distribute ranks over the experts of a layer by their importance.

    Args:
        stored: The largest rank, in [1, inf).
        importance: I_ij of each expert, in [0, inf).

    Returns:
        R_ij of each expert, in [1, stored].
    """
    weights = _weights(importance)
    shares = weights / weights.max() * stored
    # What is a whole number but for rounding is that number.
    return tuple(max(1, math.floor(share + 1e-9)) for share in shares.tolist())


def skew(importance: Sequence[float]) -> float:
    """Compute how much larger a layer's largest rank is than its mean rank.

    Args:
        importance: I_ij of each expert, in [0, inf).

    Returns:
        max_j R_ij / R_a before rounding, in [1, inf).
    """
    weights = _weights(importance)
    return float(weights.max() / weights.mean())


def _weights(importance: Sequence[float]) -> NDArray[np.float64]:
    values = np.asarray(importance, np.float64)
    mean = values.mean()
    if mean <= 0:
        return np.ones(len(values))
    found: NDArray[np.float64] = (values / mean + _FLOOR) ** _ALPHA
    return found
