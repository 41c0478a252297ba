"""Ridge regression of what a layer should add, its strength judged by held-out rows.

With Z the rows that fit and E what they should add, the change is ::

    C = argmin || E - Z C ||_F^2 + r s || C ||_F^2 = (Z^T Z + r s I)^-1 Z^T E
                                                   = Z^T (Z Z^T + r s I)^-1 E

where s is the mean of diag(Z^T Z): of the two forms the one with the smaller matrix is solved.
The strength r is that of `STRENGTHS` with which held-out rows are left with the least error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

STRENGTHS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


@dataclass(frozen=True)
class Block:
    """Columns of Z that are 0 outside some rows, such as those of one expert.

    Attributes:
        rows: Which rows are not, int64 [present], ascending.
        values: What is in them, float32 [present, columns].
    """

    rows: torch.Tensor
    values: torch.Tensor

    def between(self, first: int, last: int) -> Block:
        """Take rows `first` to `last - 1`, counted from 0 again."""
        inside = (self.rows >= first) & (self.rows < last)
        return Block(self.rows[inside] - first, self.values[inside])

    def scaled(self, weights: torch.Tensor) -> Block:
        """Multiply every row by a number; weights are [all rows]."""
        return Block(self.rows, self.values * weights[self.rows, None].to(self.values.dtype))


@dataclass(frozen=True)
class Change:
    """Update of the matrices that the blocks are inputs of.

    Attributes:
        matrices: One for each block, float64 [columns, outputs].
        strength: r; None where no strength does held-out rows any good, and all is 0.
        error: Squared error of the held-out rows before.
        error_left: And with the change, as the regression foresees it.
    """

    matrices: tuple[torch.Tensor, ...]
    strength: float | None
    error: float
    error_left: float


def fit_change(
    blocks: Sequence[Block],
    error: torch.Tensor,
    held_out: Sequence[Block],
    held_out_error: torch.Tensor,
    strengths: Sequence[float] = STRENGTHS,
) -> Change:
    """Find the change that brings the error of rows down, without spoiling others.

    Args:
        blocks: Z, block by block.
        error: E, float [rows, outputs].
        held_out: The same blocks of the rows that judge.
        held_out_error: What these should add, float [held-out rows, outputs].
        strengths: r to choose from, each in (0, inf).

    Returns:
        The change.
    """
    wanted, judged = error.double(), held_out_error.double()
    before = float(judged.square().sum())
    nothing = tuple(wanted.new_zeros(b.values.shape[1], wanted.shape[1]) for b in blocks)
    best = Change(nothing, None, before, before)
    columns = sum(block.values.shape[1] for block in blocks)
    squares = sum(float(block.values.double().square().sum()) for block in blocks)
    if not squares > 0:
        return best
    is_primal = columns <= len(wanted)
    matrix = _gram(blocks, len(wanted)) if is_primal else _kernel(blocks, len(wanted))
    right = _transpose_times(blocks, wanted) if is_primal else None
    diagonal = torch.diagonal(matrix)
    bare = diagonal.clone()
    for strength in strengths:
        diagonal.copy_(bare + strength * squares / columns)
        factor = torch.linalg.cholesky(matrix)
        if right is not None:
            solved = torch.cholesky_solve(torch.cat(right), factor)
            found = torch.split(solved, [block.values.shape[1] for block in blocks])
        else:
            found = tuple(_transpose_times(blocks, torch.cholesky_solve(wanted, factor)))
        left = float((judged - predict(held_out, found, len(judged))).square().sum())
        if left < best.error_left:
            best = Change(tuple(found), strength, before, left)
    return best


def predict(
    blocks: Sequence[Block], matrices: Sequence[torch.Tensor], rows: int
) -> torch.Tensor:
    """Multiply Z by a change.

    Args:
        blocks: Z.
        matrices: One for each block, float64 [columns, outputs].
        rows: How many rows Z has.

    Returns:
        float64 [rows, outputs].
    """
    total = matrices[0].new_zeros(rows, matrices[0].shape[1])
    for block, matrix in zip(blocks, matrices, strict=True):
        total.index_add_(0, block.rows, block.values.double() @ matrix)
    return total


def _gram(blocks: Sequence[Block], rows: int) -> torch.Tensor:
    dense = [
        torch.zeros(rows, block.values.shape[1], dtype=torch.float64).index_copy_(
            0, block.rows, block.values.double()
        )
        for block in blocks
    ]
    stacked = torch.cat(dense, dim=1)
    return stacked.T @ stacked


def _kernel(blocks: Sequence[Block], rows: int) -> torch.Tensor:
    kernel = torch.zeros(rows, rows, dtype=torch.float64)
    for block in blocks:
        values = block.values.double()
        kernel[block.rows[:, None], block.rows] += values @ values.T
    return kernel


def _transpose_times(blocks: Sequence[Block], right: torch.Tensor) -> list[torch.Tensor]:
    return [block.values.double().T @ right[block.rows] for block in blocks]
