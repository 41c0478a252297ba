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

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgemoe.calibrate.sums import LayerSums


def reap(sums: LayerSums) -> NDArray[np.float64]:
    """Score experts by their mean gated output norm.

    Args:
        sums: Sums of the task over one layer of E experts.

    Returns:
        S_j of each expert, float64 `[E]`.
    """
    return mean_gated_norm(sums)
