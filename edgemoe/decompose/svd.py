"""svd: the second stage of MoE-I² (Yang et al., 2024), truncated SVD of every expert matrix.

https://arxiv.org/abs/2411.01016. Expert j of layer i with the ranks R_ij becomes ::

    W_j = U T V^T  ->  (U_k sqrt(T_k)) (sqrt(T_k) V_k^T),    k = R_ij

for its first product and for its second. No token is read: all inputs count alike, which is
what `svd-whitened` must beat. Gate and up rows are one matrix here: both read the same input,
and one inner factor serves both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgemoe.decompose.layer_factors import expert_matrices, gather_factors
from edgemoe.decompose.truncation import truncate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgemoe.decompose.layer_factors import LayerFactors
    from edgemoe.models.layers.layer import MoeLayer


def svd(layer: MoeLayer, ranks: Sequence[tuple[int, int]]) -> LayerFactors:
    """Factor a layer's experts by their weights alone.

    Args:
        layer: A layer of whole experts, its weights in memory; it is not changed.
        ranks: Of each expert the ranks of its first and its second product.

    Returns:
        The factors nearest to the weights in Frobenius norm.
    """
    return gather_factors(
        layer,
        (
            (truncate(up, up_rank), truncate(down, down_rank))
            for expert, (up_rank, down_rank) in enumerate(ranks)
            for up, down in [expert_matrices(layer, expert)]
        ),
    )
