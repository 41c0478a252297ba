from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgemoe.decompose.ranks import Product, share_out, skew, spread
from edgemoe.errors import PlanError

products = st.lists(
    st.builds(
        Product,
        experts=st.integers(1, 8),
        rows=st.integers(2, 90),
        columns=st.integers(2, 90),
        weight=st.floats(0.2, 4),
    ),
    min_size=1,
    max_size=6,
)
importances = st.lists(st.floats(0, 1e6), min_size=1, max_size=9)


def stored(found: list[Product], ranks: tuple[int, ...]) -> int:
    return sum(
        product.experts * rank * (product.rows + product.columns)
        for product, rank in zip(found, ranks, strict=True)
    )


@given(
    found=products,
    ratio=st.floats(0.01, 1),
    multiple=st.integers(1, 16),
    fixed=st.integers(0, 50),
)
def test_ranks_are_within_the_ratio_and_none_can_be_raised(
    found: list[Product], ratio: float, multiple: int, fixed: int
) -> None:
    before = fixed + sum(p.experts * p.rows * p.columns for p in found)
    if stored(found, (1,) * len(found)) + fixed > ratio * before:
        with pytest.raises(PlanError, match="rank 1 takes that much"):
            share_out(found, ratio, multiple=multiple, fixed=fixed)
        return

    ranks = share_out(found, ratio, multiple=multiple, fixed=fixed)

    left = ratio * before - fixed - stored(found, ranks)
    assert left >= 0
    finest = share_out(found, ratio, fixed=fixed)
    assert stored(found, ranks) >= 0.99 * stored(found, finest)
    unused = ratio * before - fixed - stored(found, finest)
    for product, rank, fine in zip(found, ranks, finest, strict=True):
        whole = product.rows * product.columns
        assert 1 <= rank <= min(product.rows, product.columns)
        # No factors are larger than their matrix.
        assert rank * (product.rows + product.columns) <= whole
        raised = (fine + 1) * (product.rows + product.columns)
        assert raised > whole or product.experts * (product.rows + product.columns) > unused
    step = math.gcd(*ranks)
    assert step % multiple == 0 or any(
        step % (multiple >> halvings) == 0 for halvings in range(multiple.bit_length())
    )


def test_every_product_keeps_the_same_fraction() -> None:
    found = [
        Product(experts=16, rows=1536, columns=2048),
        Product(experts=16, rows=2048, columns=768),
    ] * 4
    for ratio in (0.25, 0.5, 0.8):
        for product, rank in zip(found, share_out(found, ratio), strict=True):
            kept = rank * product.per_rank / product.parameters
            assert kept == pytest.approx(ratio, rel=0.01)


def test_weights_move_parameters_between_products() -> None:
    heavy = Product(experts=4, rows=64, columns=64, weight=2)
    light = Product(experts=4, rows=64, columns=64, weight=1)

    ranks = share_out([heavy, light], 0.6)

    assert ranks[0] == pytest.approx(2 * ranks[1], abs=2)
    assert sum(ranks) == math.floor(0.6 * 64)
    # The heavy one ends where its factors are as large as the matrix.
    assert share_out([heavy, light], 0.95)[0] == 32


def test_multiples_are_kept_where_the_ratio_allows_them() -> None:
    large = [Product(experts=8, rows=2048, columns=1024)] * 24
    assert {rank % 16 for rank in share_out(large, 0.5, multiple=16)} == {0}
    small = [Product(experts=8, rows=64, columns=32)]
    # 10 of 21: a multiple of 8 would leave a fifth of the parameters unused.
    assert share_out(small, 0.5, multiple=8) == (10,)


@pytest.mark.parametrize(
    ("ratio", "multiple", "message"),
    [
        (0, 1, r"in \(0, 1\], got 0"),
        (1.2, 1, "factors are larger than the matrices"),
        (float("nan"), 1, r"in \(0, 1\], got nan"),
        (0.02, 1, r"must be in \[0.0469, 1\] for these experts, because rank 1"),
        (0.5, 0, r"multiple must be an integer in \[1, inf\), got 0"),
    ],
)
def test_what_cannot_be_is_refused_with_the_bound(
    ratio: float, multiple: int, message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        share_out([Product(experts=2, rows=64, columns=32)], ratio, multiple=multiple)
    # The bound itself is within it.
    assert share_out([Product(experts=2, rows=64, columns=32)], 0.0469) == (1,)


def test_matrices_that_are_vectors_are_refused() -> None:
    with pytest.raises(PlanError, match="one row or one column"):
        share_out([Product(experts=2, rows=1, columns=32)], 1)


@given(importance=importances, largest=st.integers(1, 200))
def test_experts_of_a_layer_get_the_ranks_of_moe_i2(
    importance: list[float], largest: int
) -> None:
    """R_ij as printed, with the mean rank R_a at which the largest is what is stored."""
    mean = math.fsum(importance) / len(importance)
    powers = [(value / mean + 0.01) ** 0.15 if mean > 0 else 1.0 for value in importance]
    mean_rank = largest / skew(importance)

    found = spread(largest, importance)

    assert max(found) == largest
    for power, rank in zip(powers, found, strict=True):
        share = power / math.fsum(powers) * mean_rank * len(importance)
        if abs(share - round(share)) > 1e-6:
            assert rank == max(1, math.floor(share))


def test_equal_importance_gives_equal_ranks() -> None:
    assert spread(24, [3.0] * 5) == (24,) * 5
    assert spread(24, [0.0] * 5) == (24,) * 5
    assert skew([7.0, 7.0]) == 1
    # 11:1 and a hundredth of the mean each: 1.40 times the rank.
    assert spread(28, [1.0, 11.0]) == (19, 28)
