"""Fractions of neurons become widths that kernels like, and never more than was asked for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgemoe.errors import PlanError
from edgemoe.models.shapes import LayerShape, ModelShape
from edgemoe.plans.channels import read_mask
from edgemoe.prune.registry import count_for
from edgemoe.prune.widths import (
    check_widths,
    count_widths,
    keep_equal,
    keep_ragged,
    share_widths,
)

LAYERS = st.lists(
    st.tuples(st.integers(1, 80), st.integers(1, 12), st.floats(0, 1)), min_size=1, max_size=8
)


def shape_of(*layers: tuple[int, int]) -> ModelShape:
    widest = max(size for size, _ in layers)
    return ModelShape(
        family="x",
        layers=tuple(
            LayerShape(layer=n, num_experts=experts, top_k=1, intermediate_size=size)
            for n, (size, experts) in enumerate(layers)
        ),
        hidden_size=32,
        intermediate_size=widest,
    )


@given(LAYERS)
def test_widths_take_no_more_than_what_was_wanted_and_leave_less_than_a_step(
    layers: list[tuple[int, int, float]],
) -> None:
    sizes, experts = [size for size, _, _ in layers], [count for _, count, _ in layers]
    wanted = [size * share for size, _, share in layers]

    widths = share_widths(wanted, sizes, experts)

    least = [min(8, size) for size in sizes]
    for width, size, low in zip(widths, sizes, least, strict=True):
        assert low <= width <= size
        assert width % 8 == 0 or width == size
    budget = sum(want * count for want, count in zip(wanted, experts, strict=True))
    used = sum(width * count for width, count in zip(widths, experts, strict=True))
    if sum(low * count for low, count in zip(least, experts, strict=True)) <= budget:
        assert used <= budget + 1e-5
        # What is left would not take any layer that is below its due a step further.
        for width, size, count, want in zip(widths, sizes, experts, wanted, strict=True):
            if width < want - 1e-5:
                assert used + (min(size, width + 8) - width) * count > budget
    else:
        assert list(widths) == least
    if all(want >= low for want, low in zip(wanted, least, strict=True)):
        assert all(abs(w - want) < 8 + 1e-5 for w, want in zip(widths, wanted, strict=True))


@given(st.integers(1, 10).map(lambda n: 8 * n), st.integers(1, 16), st.floats(0.13, 1))
def test_alike_layers_differ_by_a_step_at_most(size: int, layers: int, keep: float) -> None:
    shape = shape_of(*[(size, 4)] * layers)
    if keep * size * 4 * layers < 8 * 4 * layers - 1e-6:
        with pytest.raises(PlanError, match=r"must leave 8 neurons in every expert"):
            count_widths(shape, keep)
        return
    widths = count_widths(shape, keep)
    assert max(widths) - min(widths) <= 8
    assert list(widths) == sorted(widths, reverse=True)
    total = keep * size * layers
    assert total - 8 < sum(widths) <= total + 1e-5


def test_fractions_that_fit_give_one_width() -> None:
    shape = shape_of((64, 4), (64, 4))
    assert count_widths(shape, 0.5) == (32, 32)
    assert count_widths(shape, 1.0) == (64, 64)
    assert count_widths(shape, 0.70) == (48, 40)
    assert count_for("camera", shape, 0.5) == (32, 32)
    assert count_for("reap", shape, 0.5) == (2, 2)
    # A layer that must have 8 is paid for by the one that has most to spare.
    assert share_widths([1, 31], [64, 64], [2, 2]) == (8, 24)


def test_what_cannot_be_is_refused() -> None:
    shape = shape_of((64, 4), (32, 4))
    for keep in (0.0, -1.0, 1.5, float("nan")):
        with pytest.raises(PlanError, match=r"a fraction of the neurons in \(0, 1\]"):
            count_widths(shape, keep)
    with pytest.raises(PlanError, match=r"which are 0.167 of them here, got 0.1. Keep more"):
        count_widths(shape, 0.1)
    with pytest.raises(PlanError, match="one width for each of the 2 MoE layers, got 1"):
        check_widths(shape, [8])
    with pytest.raises(PlanError, match=r"layer 1 must keep neurons in \[1, 32\] .* got 40"):
        check_widths(shape, [64, 40])


def test_the_best_of_each_expert_or_of_the_layer() -> None:
    scores = np.array([[5.0, 9, 1, 7, 3, 3], [0.5, 0.1, 0, 0, 0.2, 0]])

    equal = [read_mask(str(e.neurons)) for e in keep_equal(3, scores, 3).experts]
    assert equal == [(0, 1, 3), (0, 1, 4)]
    ragged = [read_mask(str(e.neurons)) for e in keep_ragged(3, scores, 5).experts]
    assert ragged == [(0, 1, 3, 4), (0,)]
    # All neurons of an expert are no mask.
    assert [e.neurons for e in keep_equal(3, scores, 6).experts] == [None, None]
    assert keep_ragged(3, scores, 7).experts[0].neurons is None
