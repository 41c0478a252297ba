"""Scores of experts that several methods build on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgemoe.calibrate.sums import LayerSums


def mean_gated_norm(sums: LayerSums) -> NDArray[np.float64]:
    """Compute S_j of every expert (https://arxiv.org/abs/2510.13999).

    Args:
        sums: The layer's sums, whose `gate_norm` has the gates renormalised.

    Returns:
        Mean over the expert's tokens of gate times output norm, float64 [experts]; 0 for an
        expert that no token reached.
    """
    return per_reached_token(sums, sums.gate_norm)


def per_reached_token(sums: LayerSums, total: NDArray[np.float64]) -> NDArray[np.float64]:
    """Divide a sum of every expert by how many tokens reached it.

    Args:
        sums: The layer's sums.
        total: What to divide, float64 [experts].

    Returns:
        float64 [experts]; 0 for an expert that no token reached.
    """
    return np.divide(total, sums.count, out=np.zeros_like(total), where=sums.count > 0)
