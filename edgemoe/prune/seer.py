"""seer: heavy-hitter counting of SEER-MoE (Muzio et al., 2024), its soft variant.

https://arxiv.org/abs/2404.05089. With A_t the experts that token t is routed to and g_tj their
gates, the heavy hitters of a layer are the experts of the largest ::

    S_j = sum_t 1[j in A_t] g_tj

The hard variant, which counts tokens instead of adding gates, is `frequency`. Gates are
those over the top-k divided by their sum, so that a routed scaling factor cancels. The
paper's second step, fine-tuning for a smaller top-k, is no part of pruning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgemoe.calibrate.sums import LayerSums


def seer(sums: LayerSums) -> NDArray[np.float64]:
    """Score experts by the sum of their gates.

    Args:
        sums: Sums of the task over one layer of E experts.

    Returns:
        S_j of each expert, float64 `[E]`.
    """
    return sums.gate_mass
