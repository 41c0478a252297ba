"""The best maps of a given rank through which all experts of a layer see and are seen.

Inputs. Let X [H, T] be what reaches the layer's experts, S = X X^T, W_j [2I, H] the first
product of expert j, f_j how much it is used, and M = sum_j f_j W_j^T W_j. The best map B P of
rank R to put between X and the experts minimises ::

    sum_j f_j || W_j (X - B P X) ||_F^2 = || M^1/2 (I - B P) S^1/2 ||_F^2

By Eckart and Young no M^1/2 B P S^1/2 of rank R is nearer to C = M^1/2 S^1/2 than C V V^T, V
[H, R] being the top eigenvectors of C^T C = S^1/2 M S^1/2. P = V^T S^-1/2 and B = S^1/2 V
reach it, whatever the rank of M is, and leave the sum of the other eigenvalues. B P is an
oblique projection: what is dropped depends on what inputs look like and on what experts read.
Without data S = I, and it is the orthogonal projection on the top eigenvectors of M.

P and B are determined up to an invertible matrix between them. Here the rows of P are
orthonormal, so that P x is no larger than x, whatever type it is held in, and
B = S P^T (P S P^T)^-1: the linear estimate of x from P x of least squares.

Outputs. Q and Q^T minimise || Y - Q Q^T Y ||_F^2: Q [H, R] are the top eigenvectors of Y Y^T.
Best Y [H, T] is what the experts of a token together add to the residual stream, gates
included: Q is common to all, so the error of their sum is minimised itself. Where only
activations are known, or nothing, sum_j f_j D_j A_j D_j^T stands for Y Y^T, with D_j [H, I] the
second product, and A_j the second moment of an expert's activations, or I.

Whitening by second moments is that of SVD-LLM v2 (https://arxiv.org/abs/2503.12340).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from edgemoe.errors import PlanError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

# Of the mean eigenvalue of S.
DEFAULT_RIDGE = 1e-4


@dataclass(frozen=True, kw_only=True)
class Projection:
    """A map of rank R from a space to itself.

    Attributes:
        reduce: The part that comes first, float64 [rank, hidden]; its rows are orthonormal.
        expand: The part that comes second, float64 [hidden, rank].
        lost: Share of the squared norm that is gone, in [0, 1].
    """

    reduce: torch.Tensor
    expand: torch.Tensor
    lost: float


def input_projection(
    products: Iterable[torch.Tensor],
    rank: int,
    *,
    second_moment: torch.Tensor | None = None,
    shares: Sequence[float] | None = None,
    ridge: float = DEFAULT_RIDGE,
) -> Projection:
    """Find what the experts of a layer best see of their input.

    Args:
        products: W_j, float [2 * intermediate, hidden], one after the other.
        rank: R, in [1, hidden].
        second_moment: S, float64 [hidden, hidden], symmetric, positive semidefinite; None for
            the identity.
        shares: f_j, one for each expert, in [0, inf); all alike by default.
        ridge: Fraction of S's mean eigenvalue that is added to all of them, in [0, inf): what
            no token showed is not free to be lost. With 0, S must be positive definite.

    Returns:
        P to `reduce` and B to `expand`; `lost` is of S as it was given.

    Raises:
        PlanError: The rank, the shares or the moment do not fit.
    """
    reads = _weigh((product.T @ product for product in _in_float64(products)), shares)
    _check_rank(rank, reads)
    if second_moment is None:
        _, top = _top(reads, rank)
        reduce, expand = top.T.contiguous(), top
        moment = torch.eye(len(reads), dtype=torch.float64)
    else:
        moment = _check_moment(second_moment, reads)
        mean = moment.diagonal().mean()
        seen = moment + ridge * mean * torch.eye(len(moment), dtype=torch.float64)
        values, vectors = torch.linalg.eigh(seen)
        if not values[0] > torch.finfo(torch.float64).eps * len(values) * values[-1]:
            raise PlanError(
                "a second moment must be positive definite, got the eigenvalue "
                f"{float(values[0]):.3g}. Pass a ridge above 0, or read more tokens."
            )
        root = (vectors * values.sqrt()) @ vectors.T
        _, top = _top(root @ reads @ root, rank)
        orthonormal, _ = torch.linalg.qr((vectors / values.sqrt()) @ (vectors.T @ top))
        reduce = _with_signs(orthonormal).T.contiguous()
        crossed = seen @ reduce.T
        expand = torch.linalg.solve(reduce @ crossed, crossed.T).T
    missed = torch.eye(len(reads), dtype=torch.float64) - expand @ reduce
    total = float((reads * moment).sum())
    lost = float(((missed.T @ reads @ missed) * moment).sum())
    return Projection(reduce=reduce, expand=expand, lost=_share(lost, total))


def output_projection(second_moment: torch.Tensor, rank: int) -> Projection:
    """Find what is best kept of the experts' outputs.

    Args:
        second_moment: Y Y^T, float64 [hidden, hidden], symmetric, positive semidefinite.
        rank: R, in [1, hidden].

    Returns:
        Q^T to `reduce` and Q to `expand`.

    Raises:
        PlanError: The rank does not fit.
    """
    moment = _check_moment(second_moment, second_moment)
    _check_rank(rank, moment)
    values, top = _top(moment, rank)
    lost = float(moment.trace() - values.sum())
    return Projection(
        reduce=top.T.contiguous(), expand=top, lost=_share(lost, float(moment.trace()))
    )


def output_second_moment(
    products: Iterable[torch.Tensor],
    *,
    biases: torch.Tensor | None = None,
    shares: Sequence[float] | None = None,
    activations: Iterable[torch.Tensor] | None = None,
) -> torch.Tensor:
    """Add up the second moments of the experts' outputs, one expert by one.

    Args:
        products: D_j, float [hidden, intermediate], one after the other.
        biases: b_j, float [experts, hidden].
        shares: f_j, one for each expert, in [0, inf); all alike by default.
        activations: A_j, float64 [intermediate, intermediate], one after the other; with biases
            a last row and column are those of an activation that is always 1. The identity by
            default.

    Returns:
        float64 [hidden, hidden].

    Raises:
        PlanError: There is not one share for each expert.
    """

    def moments() -> Iterator[torch.Tensor]:
        given = None if activations is None else iter(activations)
        for expert, product in enumerate(_in_float64(products)):
            columns = product
            if biases is not None:
                columns = torch.cat((product, biases[expert].double()[:, None]), dim=1)
            yield (columns if given is None else columns @ next(given).double()) @ columns.T

    return _weigh(moments(), shares)


def _in_float64(matrices: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    for matrix in matrices:
        yield matrix.double()


def _weigh(moments: Iterable[torch.Tensor], shares: Sequence[float] | None) -> torch.Tensor:
    total: torch.Tensor | None = None
    count = 0
    for number, moment in enumerate(moments):
        share = 1.0 if shares is None else shares[number] if number < len(shares) else -1.0
        count += 1
        part = share * moment
        total = part if total is None else total.add_(part)
    if total is None or (shares is not None and (len(shares) != count or min(shares) < 0)):
        raise PlanError(
            f"there must be one share in [0, inf) for each of the {count} experts, got "
            f"{shares}. Pass how many tokens each expert got."
        )
    return total


def _check_rank(rank: int, moment: torch.Tensor) -> None:
    if not 1 <= rank <= len(moment):
        raise PlanError(
            f"the rank of shared bases must be in [1, {len(moment)}], the hidden size, got "
            f"{rank}. Choose another."
        )


def _check_moment(moment: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Refuse what is no second moment; return it in float64, exactly symmetric."""
    hidden = len(like)
    if moment.shape != (hidden, hidden) or not bool(torch.isfinite(moment).all()):
        raise PlanError(
            f"a second moment must be [{hidden}, {hidden}] and finite, got "
            f"{tuple(moment.shape)}. Collect it again."
        )
    wide = moment.double()
    return (wide + wide.T) / 2


def _top(moment: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the largest eigenvalues, falling, and their eigenvectors in columns."""
    values, vectors = torch.linalg.eigh((moment + moment.T) / 2)
    return values.flip(0)[:rank], _with_signs(vectors.flip(1)[:, :rank])


def _with_signs(columns: torch.Tensor) -> torch.Tensor:
    """Make the largest entry of each column positive: solvers leave signs open."""
    largest = columns.gather(0, columns.abs().argmax(dim=0, keepdim=True))
    return columns * torch.where(largest < 0, -1.0, 1.0)


def _share(part: float, total: float) -> float:
    return min(max(part / total, 0.0), 1.0) if total > 0 else 0.0
