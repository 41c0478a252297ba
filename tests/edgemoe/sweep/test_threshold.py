"""The threshold against its definition."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgemoe.sweep.threshold import Point, choose_deepest, find_nearest, find_threshold


def point(fraction: float, upper: float, *, drop: float = 0.0, series: str = "m") -> Point:
    return Point(
        series=series,
        keep=fraction,
        kept_fraction=fraction,
        drop=drop,
        upper=upper,
        is_cut=fraction < 1,
    )


points = st.lists(
    st.tuples(st.integers(1, 16), st.integers(-3, 9)), unique_by=lambda pair: pair[0]
).map(lambda pairs: [point(kept / 16, upper / 10) for kept, upper in pairs])


@given(points, st.integers(0, 8))
def test_it_and_every_shallower_cut_hold_and_none_deeper(
    found: list[Point], tenths: int
) -> None:
    limit = tenths / 10
    candidates = [
        one
        for one in found
        if one.kept_fraction < 1
        and all(
            other.upper <= limit for other in found if other.kept_fraction >= one.kept_fraction
        )
    ]
    expected = min((one.kept_fraction for one in candidates), default=None)
    threshold = find_threshold(found, limit)
    assert (None if threshold is None else threshold.kept_fraction) == expected
    # A stricter limit never allows a deeper cut.
    stricter = find_threshold(found, limit / 2)
    assert stricter is None or (
        threshold is not None and stricter.kept_fraction >= threshold.kept_fraction
    )


def test_a_lucky_deep_cut_does_not_count() -> None:
    found = [point(0.25, 0.01), point(0.5, 0.3), point(0.75, 0.02), point(1.0, 0.0)]
    threshold = find_threshold(found, 0.05)
    assert threshold is not None
    assert threshold.kept_fraction == 0.75
    assert find_threshold(found, 0.019) is None
    assert find_threshold([point(0.5, float("nan"))], 1.0) is None
    # Keeping all is no cut.
    assert find_threshold([point(1.0, 0.0)], 0.05) is None


def test_the_deepest_of_several_methods_is_the_one_that_loses_least() -> None:
    deep = point(0.5, 0.05, drop=0.03, series="b")
    found = [point(0.75, 0.0), None, point(0.5, 0.04, drop=0.04, series="a"), deep]
    assert choose_deepest(found) is deep
    assert choose_deepest([None, None]) is None
    nearest = find_nearest([point(1.0, 0.0), point(0.5, 0.4), point(0.75, 0.2)])
    assert nearest is not None
    assert nearest.upper == pytest.approx(0.2)
    assert find_nearest([point(1.0, 0.0)]) is None
