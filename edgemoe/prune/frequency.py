"""frequency: keep the experts that the router chooses most often on the task.

For expert j with A_t the experts that token t is routed to::

    S_j = sum_t 1[j in A_t]

The baseline of task-specific pruning, as in Chen et al., 2022, https://arxiv.org/abs/2206.00277
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgemoe.calibrate.sums import LayerSums


def frequency(sums: LayerSums) -> NDArray[np.float64]:
    """Score experts by how many tokens are routed to them.

    Args:
        sums: Sums of the task over one layer of E experts.

    Returns:
        S_j of each expert, float64 `[E]`.
    """
    return sums.count
