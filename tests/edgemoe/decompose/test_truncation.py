"""Truncation against the published formula, and against the optimum that scipy computes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import scipy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgemoe.decompose.truncation import Truncation, second_moment, truncate
from edgemoe.errors import CheckpointError

if TYPE_CHECKING:
    from numpy.typing import NDArray

sizes = st.integers(2, 12)


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def product(found: Truncation) -> NDArray[np.float64]:
    value: NDArray[np.float64] = (found.outer @ found.inner).numpy()
    return value


def plain(weight: torch.Tensor, rank: int) -> NDArray[np.float64]:
    left, values, right = scipy.linalg.svd(weight.numpy(), full_matrices=False)
    value: NDArray[np.float64] = (left[:, :rank] * values[:rank]) @ right[:rank]
    return value


@pytest.mark.parametrize(("rows", "columns"), [(12, 7), (7, 12), (9, 9)])
def test_it_is_the_formula_of_svd_llm(rows: int, columns: int) -> None:
    weight, inputs = draw(0, rows, columns), draw(1, columns, 40) * draw(2, columns, 1)
    left, values, _ = scipy.linalg.svd((inputs @ inputs.T).numpy())
    root = left * np.sqrt(values)
    u, t, v = scipy.linalg.svd(weight.numpy() @ root)
    rank = 4
    expected = (u[:, :rank] * t[:rank]) @ v[:rank] @ np.diag(values**-0.5) @ left.T

    found = truncate(weight, rank, second_moment(inputs.T))

    np.testing.assert_allclose(product(found), expected, rtol=1e-5, atol=1e-6)
    assert found.lost == pytest.approx(float((t[rank:] ** 2).sum()), rel=1e-6)


@settings(deadline=None)
@given(rows=sizes, columns=sizes, tokens=st.integers(1, 30), data=st.data())
def test_no_matrix_of_that_rank_is_nearer(
    rows: int, columns: int, tokens: int, data: st.DataObject
) -> None:
    """Fewer tokens than inputs included: Eckart and Young for the outputs W X."""
    rank = data.draw(st.integers(1, min(rows, columns)))
    seed = data.draw(st.integers(0, 2**31))
    weight, inputs = draw(seed, rows, columns), draw(seed + 1, columns, tokens)
    outputs = (weight @ inputs).numpy()
    least = float((scipy.linalg.svdvals(outputs)[rank:] ** 2).sum())
    tiny = 1e-6 * float((outputs**2).sum())

    found = truncate(weight, rank, second_moment(inputs.T))

    error = float(((outputs - product(found) @ inputs.numpy()) ** 2).sum())
    assert error <= least + tiny
    assert found.lost == pytest.approx(error, rel=1e-3, abs=tiny)
    without = truncate(weight, rank)
    assert error <= float(((outputs - product(without) @ inputs.numpy()) ** 2).sum()) + tiny


@pytest.mark.parametrize(("rows", "columns"), [(12, 7), (7, 12)])
def test_inputs_that_count_alike_give_the_plain_decomposition(rows: int, columns: int) -> None:
    weight = draw(5, rows, columns)
    expected = plain(weight, 3)
    for moment in (None, torch.eye(columns).double(), torch.zeros(columns, columns).double()):
        found = truncate(weight, 3, moment)

        np.testing.assert_allclose(product(found), expected, atol=1e-7)
    values = scipy.linalg.svdvals(weight.numpy())
    assert truncate(weight, 3).lost == pytest.approx(float((values[3:] ** 2).sum()))


def test_singular_values_are_shared_evenly() -> None:
    weight = draw(6, 8, 5)
    found = truncate(weight, 4)
    roots = np.sqrt(scipy.linalg.svdvals(weight.numpy())[:4])

    np.testing.assert_allclose(found.inner.norm(dim=1), roots)
    np.testing.assert_allclose(found.outer.norm(dim=0), roots)


def test_what_no_input_reaches_is_left_to_the_plain_decomposition() -> None:
    """One token takes one direction of the outputs; the other three are free."""
    weight, token = draw(7, 6, 5), draw(8, 5, 1)
    direction = weight @ token / (weight @ token).norm()
    rest = weight - direction @ direction.T @ weight

    found = truncate(weight, 4, token @ token.T)

    expected = (direction @ direction.T @ weight).numpy() + plain(rest, 3)
    np.testing.assert_allclose(product(found), expected, atol=1e-4)


@pytest.mark.parametrize(("rows", "columns"), [(12, 7), (7, 12)])
def test_full_rank_loses_nothing(rows: int, columns: int) -> None:
    weight, inputs = draw(9, rows, columns), draw(10, columns, 3)

    found = truncate(weight, 7, second_moment(inputs.T))

    np.testing.assert_allclose(product(found), weight.numpy(), atol=1e-12)
    assert found.lost == 0


def test_a_matrix_of_zeros_has_factors() -> None:
    found = truncate(torch.zeros(4, 3), 2)

    assert torch.equal(found.outer @ found.inner, torch.zeros(4, 3).double())


def test_what_is_not_finite_is_refused() -> None:
    weight = torch.ones(3, 3)
    weight[1, 1] = torch.inf
    with pytest.raises(CheckpointError, match="must have finite weights and activations"):
        truncate(weight, 1)
    with pytest.raises(CheckpointError, match="must have finite weights and activations"):
        truncate(torch.ones(3, 3), 1, torch.full((3, 3), torch.nan).double())


def test_moments_add_up_over_chunks() -> None:
    inputs = torch.randn(2500, 6, generator=torch.Generator().manual_seed(0))

    wide = inputs.numpy().astype(np.float64)
    np.testing.assert_allclose(second_moment(inputs).numpy(), wide.T @ wide, rtol=1e-12)
