"""msan and man: mean (squared) activation norms, without gates (Liu et al., 2026).

https://arxiv.org/abs/2606.15716 puts scores of experts into one family: with N_j the number of
tokens routed to expert j, g its gate and f_j(x) its output ::

    S_j(b, alpha, beta) = N_j^-b * sum_{x routed to j} g_j(x)^alpha ||f_j(x)||_2^beta

REAP is (1, 1, 1). ``man`` is (1, 0, 1) and ``msan`` is (1, 0, 2), which the paper recommends
where the calibration data is not that of the task: what an expert does once it is chosen
counts, not how often. An expert that no token reached scores 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgemoe.calibrate.saliency import per_reached_token
from edgemoe.prune.selection import keep_by_score

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgemoe.calibrate.statistics import TaskStatistics
    from edgemoe.models.shapes import ModelShape
    from edgemoe.plans.plan import LayerPlan


def man(
    statistics: TaskStatistics, shape: ModelShape, counts: Sequence[int], seed: int
) -> tuple[LayerPlan, ...]:
    """Keep the experts of the largest mean output norm of each layer.

    Args:
        statistics: Sums of the task.
        shape: The model.
        counts: Experts to keep per MoE layer.
        seed: Not used: the method has no chance in it.

    Returns:
        One plan per MoE layer.
    """
    del seed
    return keep_by_score(
        statistics, shape, counts, lambda sums: per_reached_token(sums, sums.norm)
    )


def msan(
    statistics: TaskStatistics, shape: ModelShape, counts: Sequence[int], seed: int
) -> tuple[LayerPlan, ...]:
    """Keep the experts of the largest mean squared output norm of each layer.

    Args:
        statistics: Sums of the task.
        shape: The model.
        counts: Experts to keep per MoE layer.
        seed: Not used: the method has no chance in it.

    Returns:
        One plan per MoE layer.
    """
    del seed
    return keep_by_score(
        statistics, shape, counts, lambda sums: per_reached_token(sums, sums.norm_squared)
    )
