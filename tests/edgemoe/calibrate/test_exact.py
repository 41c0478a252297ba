"""Exact addition against rational numbers."""

from __future__ import annotations

from fractions import Fraction
from functools import reduce

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgemoe.calibrate.exact import LIMIT, UNIT, add_exactly, round_to_grid
from edgemoe.errors import StatisticsError

# Of every size that may meet in one sum, and numbers that cancel.
SUMMANDS = st.lists(
    st.floats(-(2.0**52), 2.0**52) | st.floats(-1.0, 1.0) | st.sampled_from([2.0**52, UNIT]),
    min_size=1,
    max_size=20,
)


def add_all(values: list[float]) -> tuple[float, int]:
    pairs = [(round_to_grid(np.asarray([v]), "x"), np.zeros(1, np.int64)) for v in values]
    start = (np.zeros(1), np.zeros(1, np.int64))
    value, remainder = reduce(lambda one, two: add_exactly(one, two, "x"), pairs, start)
    return float(value[0]), int(remainder[0])


@given(SUMMANDS, st.randoms(use_true_random=False))
def test_a_sum_is_exact_in_any_order(values: list[float], random: object) -> None:
    value, remainder = add_all(values)
    unit = Fraction(UNIT)
    exact = sum(round(Fraction(v) / unit) * unit for v in values)
    assert Fraction(value) + remainder * unit == exact
    # What everybody reads is the sum's float64, or a neighbour of it.
    assert abs(value - float(exact)) <= np.spacing(abs(float(exact)))
    shuffled = list(values)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    again, left = add_all(shuffled)
    assert (np.float64(again).tobytes(), left) == (np.float64(value).tobytes(), remainder)


def test_one_summand_is_what_it_was() -> None:
    for value in (0.0, -0.0, 1.0, -0.75, 1e-3, -UNIT, 1 / 3, 123456.789, 2.0**56 + 16):
        total, remainder = add_all([value])
        assert remainder == 0
        assert abs(total - value) <= UNIT / 2
        assert abs(value) < 1 / 8 or total == value
        assert str(add_all([value, -value])[0]) == "0.0"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, LIMIT, -LIMIT])
def test_what_cannot_be_added_exactly_is_refused(value: float) -> None:
    with pytest.raises(StatisticsError, match=r"sum norm must stay below 2\*\*57, got"):
        round_to_grid(np.asarray([1.0, value]), "norm")


def test_a_sum_that_grows_too_large_is_refused() -> None:
    half = LIMIT / 2
    with pytest.raises(StatisticsError, match=r"sum x must stay below 2\*\*57, got 1\.44"):
        add_all([half, half])
