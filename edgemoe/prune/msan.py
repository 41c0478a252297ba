"""msan and man: mean (squared) activation norms, without gates (Liu et al., 2026).

https://arxiv.org/abs/2606.15716 puts scores of experts into one family: with N_j the number of
tokens routed to expert j, g its gate and f_j(x) its output ::

    S_j(b, alpha, beta) = N_j^-b * sum_{x routed to j} g_j(x)^alpha ||f_j(x)||_2^beta

REAP is (1, 1, 1). `man` is (1, 0, 1) and `msan` is (1, 0, 2), which the paper recommends
where the calibration data is not that of the task: what an expert does once it is chosen
counts, not how often. An expert that no token reached scores 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgemoe.calibrate.saliency import per_reached_token

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgemoe.calibrate.sums import LayerSums


def man(sums: LayerSums) -> NDArray[np.float64]:
    """Score experts by their mean output norm.

    Args:
        sums: Sums of the task over one layer of E experts.

    Returns:
        S_j of each expert, float64 `[E]`.
    """
    return per_reached_token(sums, sums.norm)


def msan(sums: LayerSums) -> NDArray[np.float64]:
    """Score experts by their mean squared output norm.

    Args:
        sums: Sums of the task over one layer of E experts.

    Returns:
        S_j of each expert, float64 `[E]`.
    """
    return per_reached_token(sums, sums.norm_squared)
