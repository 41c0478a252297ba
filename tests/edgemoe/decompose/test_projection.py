"""The closed forms against a numerical optimiser and against brute force."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from edgemoe.decompose.projection import (
    input_projection,
    output_projection,
    output_second_moment,
)
from edgemoe.errors import PlanError

HIDDEN, WIDE, EXPERTS, TOKENS = 6, 4, 3, 40
SHARES = (0.7, 0.1, 2.0)


def draw(*shape: int, seed: int) -> Any:
    return torch.randn(
        shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )


def tokens(seed: int) -> Any:
    """Inputs whose directions are neither orthogonal nor alike."""
    return draw(HIDDEN, HIDDEN, seed=seed) @ draw(HIDDEN, TOKENS, seed=seed + 1)


def error(products: Any, states: Any, mapped: Any, shares: Any = SHARES) -> Any:
    """sum_j f_j || W_j (X - map X) ||^2, as it is written."""
    return sum(
        share * torch.linalg.norm(product @ (states - mapped @ states)) ** 2
        for share, product in zip(shares, products, strict=True)
    )


def best_found(products: Any, states: Any, rank: int) -> float:
    """Minimise over all maps of a rank from several starts, by their gradients."""

    weights = np.stack(products.numpy()) * np.sqrt(SHARES)[:, None, None]
    given = states.numpy()

    def objective(flat: Any) -> tuple[float, Any]:
        expand, reduce = flat.reshape(2, HIDDEN, rank)
        missed = weights @ (given - expand @ (reduce.T @ given))
        slope = -2 * (weights.transpose(0, 2, 1) @ missed).sum(axis=0) @ given.T
        return float((missed**2).sum()), np.stack((slope @ reduce, slope.T @ expand)).ravel()

    starts = np.random.default_rng(0).normal(size=(8, 2 * HIDDEN * rank))
    search: Any = minimize
    tight = {"maxiter": 5000, "ftol": 1e-15, "gtol": 1e-10}
    return min(
        float(search(objective, start, jac=True, method="L-BFGS-B", options=tight).fun)
        for start in starts
    )


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_no_other_map_of_the_rank_is_better_for_inputs(rank: int) -> None:
    products, states = draw(EXPERTS, WIDE, HIDDEN, seed=0), tokens(1)
    found = input_projection(
        products, rank, second_moment=states @ states.T, shares=SHARES, ridge=0.0
    )
    reached = float(error(products, states, found.expand @ found.reduce))
    least = best_found(products, states, rank)
    total = float(error(products, states, torch.zeros(HIDDEN, HIDDEN, dtype=torch.float64)))

    assert least <= reached * (1 + 1e-9)  # it was searched well
    assert reached <= least * (1 + 1e-6)
    assert found.lost == pytest.approx(reached / total, rel=1e-9)


@pytest.mark.parametrize("rank", [1, 3])
def test_no_other_map_of_the_rank_is_better_for_outputs(rank: int) -> None:
    outputs = tokens(7)
    found = output_projection(outputs @ outputs.T, rank)
    identity = torch.eye(HIDDEN, dtype=torch.float64)[None]
    reached = float(error(identity, outputs, found.expand @ found.reduce, shares=[1.0]))
    values = np.linalg.svd(outputs.numpy(), compute_uv=False)

    assert reached == pytest.approx(float((values[rank:] ** 2).sum()), rel=1e-9)
    assert found.lost == pytest.approx(reached / float((values**2).sum()), rel=1e-9)


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 2**20),
    rank=st.integers(1, HIDDEN),
    seen=st.integers(1, TOKENS),
    has_moment=st.booleans(),
)
def test_projections_are_what_is_promised(
    seed: int, rank: int, seen: int, has_moment: bool
) -> None:
    """Also where tokens are fewer than dimensions, and experts read fewer."""
    products = draw(EXPERTS, 1, HIDDEN, seed=seed)
    states = tokens(seed + 1)[:, :seen]
    moment = states @ states.T if has_moment else None
    found = input_projection(products, rank, second_moment=moment)

    eye = torch.eye(rank, dtype=torch.float64)
    torch.testing.assert_close(found.reduce @ found.reduce.T, eye, atol=1e-9, rtol=0)
    torch.testing.assert_close(found.reduce @ found.expand, eye, atol=1e-6, rtol=0)
    assert 0 <= found.lost <= 1
    if rank >= EXPERTS:  # more than experts read of it
        assert found.lost < 1e-9
    again = input_projection(products, rank, second_moment=moment)
    assert torch.equal(again.reduce, found.reduce)


def test_data_beat_weights_alone_where_it_counts_and_only_there() -> None:
    products, states = draw(EXPERTS, WIDE, HIDDEN, seed=3), tokens(4)
    seen = input_projection(products, 2, second_moment=states @ states.T, shares=SHARES)
    blind = input_projection(products, 2, shares=SHARES)
    white = torch.eye(HIDDEN, dtype=torch.float64)
    for given_states, better, worse in ((states, seen, blind), (white, blind, seen)):
        errors = [
            float(error(products, given_states, found.expand @ found.reduce))
            for found in (better, worse)
        ]
        assert errors[0] < 0.99 * errors[1]
    torch.testing.assert_close(blind.expand, blind.reduce.T)


def test_scales_of_moments_and_shares_do_not_matter() -> None:
    products, states = draw(EXPERTS, WIDE, HIDDEN, seed=3), tokens(4)
    moment = states @ states.T
    found = input_projection(products, 2, second_moment=moment, shares=SHARES)
    scaled = input_projection(
        products, 2, second_moment=moment / 1e6, shares=[share * 1e4 for share in SHARES]
    )
    torch.testing.assert_close(scaled.reduce, found.reduce)
    torch.testing.assert_close(scaled.expand, found.expand)
    assert math.isclose(scaled.lost, found.lost, rel_tol=1e-9)


@pytest.mark.parametrize("has_bias", [False, True])
def test_the_moment_of_outputs_is_that_of_the_outputs(has_bias: bool) -> None:
    products = draw(EXPERTS, HIDDEN, WIDE, seed=5)
    biases = draw(EXPERTS, HIDDEN, seed=6) if has_bias else None
    activations = draw(EXPERTS, WIDE, TOKENS, seed=8)
    expected = torch.zeros(HIDDEN, HIDDEN, dtype=torch.float64)
    moments = []
    for expert in range(EXPERTS):
        given_units = activations[expert]
        outputs = products[expert] @ given_units
        if biases is not None:
            outputs = outputs + biases[expert][:, None]
            given_units = torch.cat((given_units, torch.ones(1, TOKENS).double()))
        expected += SHARES[expert] * outputs @ outputs.T
        moments.append(given_units @ given_units.T)

    found = output_second_moment(products, biases=biases, shares=SHARES, activations=moments)
    torch.testing.assert_close(found, expected)
    blind = output_second_moment(products.float(), biases=biases)
    white = sum(product @ product.T for product in products.float().double())
    if biases is not None:
        white += biases.T @ biases
    torch.testing.assert_close(blind, white)


def test_what_does_not_fit_is_refused() -> None:
    products, states = draw(EXPERTS, WIDE, HIDDEN, seed=0), tokens(1)
    moment = states @ states.T
    for rank in (0, HIDDEN + 1):
        with pytest.raises(PlanError, match=rf"in \[1, 6\], the hidden size, got {rank}"):
            input_projection(products, rank)
        with pytest.raises(PlanError, match=rf"in \[1, 6\], the hidden size, got {rank}"):
            output_projection(moment, rank)
    for shares in ((1.0, 1.0), (1.0, 1.0, -1.0), (1.0,) * 4):
        with pytest.raises(PlanError, match=r"one share in .* for each of the 3 experts"):
            input_projection(products, 2, shares=shares)
    for broken in (moment[:5], moment[:5, :5], moment * float("nan")):
        with pytest.raises(PlanError, match=r"must be \[6, 6\] and finite"):
            input_projection(products, 2, second_moment=broken)
    few = states[:, :3]
    with pytest.raises(PlanError, match=r"positive definite.*read more tokens"):
        input_projection(products, 2, second_moment=few @ few.T, ridge=0.0)
