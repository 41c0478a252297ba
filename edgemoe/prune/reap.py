"""reap: Router-weighted Expert Activation Pruning (Lasby et al., 2025).

https://arxiv.org/abs/2510.13999. For expert j, with X_j the tokens routed to it, f_j(x) its
output and g_j(x) its gate::

    S_j = 1/|X_j| * sum_{x in X_j} g_j(x) * ||f_j(x)||_2

and the experts of the lowest S_j of each layer are dropped. The gates are those over the
top-k divided by their sum, as the authors' code does since March 2026: a routed scaling
factor cancels, and unnormalised routers compare with the others. An expert that no token
reached scores 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgemoe.calibrate.saliency import mean_gated_norm
from edgemoe.prune.selection import keep_by_score

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgemoe.calibrate.statistics import TaskStatistics
    from edgemoe.models.shapes import ModelShape
    from edgemoe.plans.plan import LayerPlan


def reap(
    statistics: TaskStatistics, shape: ModelShape, counts: Sequence[int], seed: int
) -> tuple[LayerPlan, ...]:
    """Keep the experts of the highest mean gated output norm of each layer.

    Args:
        statistics: Sums of the task.
        shape: The model.
        counts: Experts to keep per MoE layer.
        seed: Not used: the method has no chance in it.

    Returns:
        One plan per MoE layer.
    """
    del seed
    return keep_by_score(statistics, shape, counts, mean_gated_norm)
