"""seer: heavy-hitter counting of SEER-MoE (Muzio et al., 2024), its soft variant.

https://arxiv.org/abs/2404.05089. With A_t the experts that token t is routed to and g_tj their
gates, the heavy hitters of a layer are the experts of the largest ::

    S_j = sum_t 1[j in A_t] g_tj

The hard variant, which counts tokens instead of adding gates, is ``frequency``. Gates are
those over the top-k divided by their sum, so that a routed scaling factor cancels. The
paper's second step, fine-tuning for a smaller top-k, is no part of pruning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgemoe.prune.selection import keep_by_score

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgemoe.calibrate.statistics import TaskStatistics
    from edgemoe.models.shapes import ModelShape
    from edgemoe.plans.plan import LayerPlan


def seer(
    statistics: TaskStatistics, shape: ModelShape, counts: Sequence[int], seed: int
) -> tuple[LayerPlan, ...]:
    """Keep the experts of the largest gate mass of each layer.

    Args:
        statistics: Sums of the task.
        shape: The model.
        counts: Experts to keep per MoE layer.
        seed: Not used: the method has no chance in it.

    Returns:
        One plan per MoE layer.
    """
    del seed
    return keep_by_score(statistics, shape, counts, lambda sums: sums.gate_mass)
