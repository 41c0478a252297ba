"""The nearest matrix of a lower rank, where some inputs count more than others.

For a matrix W [m, n] and the second moment S = X X^T [n, n] of its inputs, SVD-LLM v2
(https://arxiv.org/abs/2503.12340) takes S = U_s T_s U_s^T, C = U_s sqrt(T_s), the singular
value decomposition W C = U T V^T, and ::

    W' = U_k T_k V_k^T C^-1

which minimises ||W X - W' X||_F^2 = tr((W - W') S (W - W')^T) over all matrices of rank k
(Eckart and Young for W C). Since U_k T_k V_k^T = U_k U_k^T W C, the same matrix is ::

    W' = U_k (U_k^T W)

with U_k the first eigenvectors of (W C) (W C)^T = W S W^T. So it is computed here: nothing is
inverted, and an S without full rank (fewer tokens than inputs) is no special case. Where m > n,
W = Q R and U_k = Q E_k with E_k the first eigenvectors of R S R^T, which is smaller.

Directions that no input has are all the same to S; a ridge of 1e-8 of its mean eigenvalue lets
the plain singular value decomposition choose among them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from edgemoe.errors import CheckpointError

_RIDGE = 1e-8
_CHUNK_TOKENS = 1024


@dataclass(frozen=True)
class Truncation:
    """A matrix as the product of two.

    Attributes:
        inner: What inputs meet first, float64 [rank, inputs].
        outer: float64 [outputs, rank]; singular values are shared evenly between both.
        lost: tr((W - W') S (W - W')^T), or ||W - W'||_F^2 without a moment, in [0, inf).
    """

    inner: torch.Tensor
    outer: torch.Tensor
    lost: float


def truncate(weight: torch.Tensor, rank: int, moment: torch.Tensor | None = None) -> Truncation:
    """Find the best factors of a rank.

    Args:
        weight: W, float [outputs, inputs].
        rank: k, in [1, min(outputs, inputs)].
        moment: S, float64 [inputs, inputs], symmetric; the identity where it is None or zero.

    Returns:
        The factors.

    Raises:
        CheckpointError: The weight or the moment is not finite.
    """
    weight = weight.double()
    basis, core = None, weight
    if weight.shape[0] > weight.shape[1]:
        basis, core = torch.linalg.qr(weight)
    gram = core @ core.T
    if moment is not None:
        mean = float(moment.diagonal().mean())
        if mean != 0:
            gram = core @ moment @ core.T + _RIDGE * mean * gram
    if not torch.isfinite(gram).all():
        raise CheckpointError(
            "experts must have finite weights and activations to be factored, got NaN or "
            "infinity. Check the checkpoint with `edgemoe evaluate`."
        )
    # Rounding may leave it a little asymmetric; eigenvalues come in rising order.
    values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    outer = vectors[:, -rank:].flip(1)
    inner = outer.T @ core
    if basis is not None:
        outer = basis @ outer
    norms = torch.linalg.vector_norm(inner, dim=1)
    scales = torch.where(norms > 0, norms.sqrt(), 1.0)
    lost = float(values[:-rank].clamp_min(0).sum())
    return Truncation(inner / scales[:, None], outer * scales, lost)


def second_moment(inputs: torch.Tensor) -> torch.Tensor:
    """Sum x x^T over tokens.

    Args:
        inputs: float [tokens, inputs].

    Returns:
        float64 [inputs, inputs].
    """
    total = torch.zeros(inputs.shape[1], inputs.shape[1], dtype=torch.float64)
    for chunk in torch.split(inputs, _CHUNK_TOKENS):
        wide = chunk.double()
        total.addmm_(wide.T, wide)
    return total
