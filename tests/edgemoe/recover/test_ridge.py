from __future__ import annotations

import numpy as np
import pytest
import scipy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgemoe.recover.ridge import Block, fit_change, predict


def draw_blocks(
    draw: np.random.Generator, rows: int, widths: list[int]
) -> tuple[list[Block], np.ndarray]:
    """Blocks with some rows each, and the dense matrix that they stand for."""
    blocks, dense = [], np.zeros((rows, sum(widths)))
    start = 0
    for width in widths:
        present = np.sort(draw.choice(rows, size=draw.integers(0, rows + 1), replace=False))
        values = draw.standard_normal((len(present), width)).astype(np.float32)
        blocks.append(Block(torch.from_numpy(present), torch.from_numpy(values)))
        dense[present, start : start + width] = values
        start += width
    return blocks, dense


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 30),
    widths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    strength=st.sampled_from([0.01, 0.3, 4.0]),
)
def test_the_change_is_that_of_least_squares_with_rows_for_the_ridge(
    seed: int, rows: int, widths: list[int], strength: float
) -> None:
    draw = np.random.default_rng(seed)
    blocks, dense = draw_blocks(draw, rows, widths)
    error = draw.standard_normal((rows, 5))

    # Judged by the rows that fit, any change is better than none.
    found = fit_change(
        blocks, torch.from_numpy(error), blocks, torch.from_numpy(error), [strength]
    )

    squares = float((dense**2).sum())
    if squares == 0:
        assert found.strength is None
        assert not any(matrix.any() for matrix in found.matrices)
        return
    ridge = np.sqrt(strength * squares / dense.shape[1]) * np.eye(dense.shape[1])
    above = np.vstack((dense, ridge))
    expected, *_ = scipy.linalg.lstsq(above, np.vstack((error, np.zeros((len(ridge), 5)))))
    assert found.strength == strength
    np.testing.assert_allclose(torch.cat(found.matrices).numpy(), expected, atol=1e-6)
    left = float(((error - dense @ expected) ** 2).sum())
    assert found.error_left == pytest.approx(left, rel=1e-5, abs=1e-9)
    assert found.error == pytest.approx(float((error**2).sum()))
    predicted = predict(blocks, found.matrices, rows)
    np.testing.assert_allclose(predicted.numpy(), dense @ expected, atol=1e-5)


def test_held_out_rows_choose_the_strength_and_may_refuse_all() -> None:
    draw = np.random.default_rng(0)
    rows, columns = 40, 30
    dense = draw.standard_normal((2 * rows, columns)).astype(np.float32)
    true = draw.standard_normal((columns, 4))
    noisy = dense @ true + 8 * draw.standard_normal((2 * rows, 4))
    everywhere = torch.arange(rows)
    fitting, judging = (
        [Block(everywhere, torch.from_numpy(part))] for part in (dense[:rows], dense[rows:])
    )
    targets = torch.from_numpy(noisy[:rows]), torch.from_numpy(noisy[rows:])
    strengths = (0.001, 0.1, 1.0, 10.0, 1000.0)

    found = fit_change(fitting, targets[0], judging, targets[1], strengths)

    alone = [
        fit_change(fitting, targets[0], judging, targets[1], [s]).error_left for s in strengths
    ]
    assert found.strength == strengths[int(np.argmin(alone))]
    assert found.strength not in (strengths[0], strengths[-1])
    assert found.error_left == min(alone)
    opposite = fit_change(fitting, targets[0], judging, -targets[1], strengths)
    assert opposite.strength is None
    assert not opposite.matrices[0].any()
    assert opposite.error == opposite.error_left


def test_scaled_rows_count_as_often_as_their_squares_say() -> None:
    draw = np.random.default_rng(1)
    blocks, _ = draw_blocks(draw, 20, [3, 4])
    error = torch.from_numpy(draw.standard_normal((20, 2)))
    weights = torch.ones(20, dtype=torch.float64)
    weights[:5] = 4

    once = fit_change(
        [block.scaled(weights.sqrt()) for block in blocks],
        error * weights.sqrt()[:, None],
        blocks,
        error,
        [1e-9],
    )

    # The first five rows again, three times, behind the others.
    index = torch.cat([torch.arange(20), *(torch.arange(5) for _ in range(3))])
    repeated = []
    for block in blocks:
        early = block.rows < 5
        copies = [block.rows[early] + 20 + 5 * copy for copy in range(3)]
        values = torch.cat([block.values, *(block.values[early] for _ in copies)])
        repeated.append(Block(torch.cat([block.rows, *copies]), values))
    four_times = fit_change(repeated, error[index], blocks, error, [1e-9])
    for ours, theirs in zip(once.matrices, four_times.matrices, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
