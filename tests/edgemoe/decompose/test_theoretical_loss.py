from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import scipy
from hypothesis import given
from hypothesis import strategies as st

from edgemoe.apply.expert_tensors import planned_tensors
from edgemoe.decompose.layer_factors import expert_matrices
from edgemoe.decompose.theoretical_loss import kept_fractions, measure_losses
from edgemoe.plans.factors import EmbeddedSample, Factors
from edgemoe.plans.keep_all import keep_all

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgemoe.oracle.oracle import LayerOracle


@given(
    losses=st.lists(st.floats(3, 1e9), min_size=1, max_size=9),
    ratio=st.floats(0.3, 1),
)
def test_what_is_removed_is_the_formulas(losses: list[float], ratio: float) -> None:
    inverse = [1 / np.log(loss) for loss in losses]

    kept = kept_fractions(losses, ratio)

    for value, found in zip(inverse, kept, strict=True):
        removed = (1 - ratio) * len(losses) * value / sum(inverse)
        assert found == pytest.approx(max(1 - removed, 0.1 * ratio))
    assert sorted(range(len(losses)), key=lambda i: (losses[i], kept[i])) == sorted(
        range(len(losses)), key=lambda i: (losses[i], losses[i])
    )


def test_losses_without_a_logarithm_are_no_exception() -> None:
    assert kept_fractions([0.0, 1.0, 2.0], 0.5) == pytest.approx((0.5, 0.5, 0.5))
    # e counts 1 and e**9 a ninth: 0.9 and 0.1 of what is removed.
    assert kept_fractions([0.1, np.e**9], 0.5) == pytest.approx((0.1, 0.9))
    assert kept_fractions([0.1, np.e**99], 0.5) == pytest.approx((0.05, 0.99))


def test_losses_are_those_of_each_layer_alone(
    make_oracle: Callable[..., LayerOracle],
) -> None:
    """Each layer sees what whole layers before it return, whatever was factored."""
    oracle = make_oracle("mixtral")
    plan = keep_all(oracle.moe.shape)
    ranks = ((6, 5),) * 8
    plan = replace(
        plan,
        layers=tuple(replace(layer, ranks=ranks) for layer in plan.layers),
        factors=Factors(
            method="svd-whitened",
            options={"prior_tokens": 0},
            sample=EmbeddedSample.of(oracle.windows),
        ),
    )

    found = measure_losses(oracle.provider, plan, planned_tensors)

    assert len(found) == len(oracle.moe.layers)
    for (up, down), view in zip(found, oracle.walk("test"), strict=True):
        squared = 0.0
        for expert in range(8):
            routed = (view.routing.indices == expert).any(dim=1)
            weight = expert_matrices(view.layer, expert)[0].double()
            outputs = (view.hidden[routed].double() @ weight.T).numpy()
            squared += float((scipy.linalg.svdvals(outputs)[6:] ** 2).sum())
        assert up == pytest.approx(squared**0.5, rel=1e-4)
        assert down > 0
