"""frequency: keep the experts that the router chooses most often on the task.

For expert j with A_t the experts that token t is routed to::

    S_j = sum_t 1[j in A_t]

The baseline of task-specific pruning, as in Chen et al., 2022, https://arxiv.org/abs/2206.00277
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgemoe.prune.selection import keep_by_score

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgemoe.calibrate.statistics import TaskStatistics
    from edgemoe.models.shapes import ModelShape
    from edgemoe.plans.plan import LayerPlan


def frequency(
    statistics: TaskStatistics, shape: ModelShape, counts: Sequence[int], seed: int
) -> tuple[LayerPlan, ...]:
    """Keep the most chosen experts of each layer.

    Args:
        statistics: Sums of the task.
        shape: The model.
        counts: Experts to keep per MoE layer.
        seed: Not used: the method has no chance in it.

    Returns:
        One plan per MoE layer.
    """
    del seed
    return keep_by_score(statistics, shape, counts, lambda sums: sums.count)
