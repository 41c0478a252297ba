"""Masks of neurons: written and read, and refused where a plan cannot have them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgemoe.errors import PlanError
from edgemoe.models.shapes import LayerShape, ModelShape
from edgemoe.plans.channels import count_mask, fits_mask, is_mask, read_mask, write_mask
from edgemoe.plans.factors import Factors
from edgemoe.plans.layer_plan import stored_width
from edgemoe.plans.plan import LayerPlan, MergedExpert, Plan

WIDTH = 20


@given(
    st.integers(1, 70).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1))))
)
def test_a_mask_is_what_was_written(drawn: tuple[int, set[int]]) -> None:
    size, kept = drawn
    text = write_mask(kept, size)
    assert is_mask(text)
    assert len(text) == -(-size // 4)
    assert read_mask(text) == tuple(sorted(kept))
    assert count_mask(text) == len(kept)
    assert fits_mask(text, size)
    assert not fits_mask(text + "0", size)
    for other in range(1, size):
        assert fits_mask(text, other) == (
            len(text) == -(-other // 4) and max(kept, default=0) < other
        )


def test_the_first_neuron_is_the_highest_bit() -> None:
    assert write_mask((0,), WIDTH) == "80000"
    assert write_mask((3, 4, 19), WIDTH) == "18001"


def plan_of(*neurons: str | None, **changes: Any) -> Plan:
    experts = tuple(
        MergedExpert(members=(expert,), neurons=text) for expert, text in enumerate(neurons)
    )
    return Plan(method="by hand", layers=(LayerPlan(layer=0, experts=experts, **changes),))


def shape_of(width: int = WIDTH, **changes: Any) -> ModelShape:
    layer = LayerShape(layer=0, num_experts=3, top_k=2, **changes)
    return ModelShape(family="x", layers=(layer,), hidden_size=32, intermediate_size=width)


def test_plans_with_neurons_keep_their_bytes_and_those_without_have_no_word_of_them() -> None:
    plan = plan_of("80000", None, "f0001")
    text = plan.to_json()
    assert '{"members": [0], "neurons": "80000"}' in text
    assert '{"members": [1]}' in text
    again = Plan.from_json(text)
    assert again == plan
    assert again.to_json() == text
    assert "neurons" not in plan_of(None, None).to_json()
    assert (plan.prunes_width, plan_of(None).prunes_width) == (True, False)


def test_a_layer_is_stored_at_the_next_multiple_of_8_of_its_widest_expert() -> None:
    def width(*counts: int, size: int = WIDTH) -> int:
        experts = plan_of(*(write_mask(range(n), size) for n in counts)).layers[0].experts
        return stored_width(experts, size)

    assert [width(1), width(8), width(3, 9), width(17, 1)] == [8, 8, 16, 20]
    assert width(3, size=5) == 5
    plan = plan_of("80000", None)
    assert plan.widths(shape_of()) == (WIDTH,)
    assert plan_of("80000", "80000").widths(shape_of(40, intermediate_size=WIDTH)) == (8,)


@pytest.mark.parametrize(
    ("neurons", "rule"),
    [
        ("00000", "must keep one or more, got none for expert 0. Keep one, or drop"),
        ("F0000", "must be lower-case hexadecimal digits, a bit for each neuron, got 'F0000'"),
        ("", "lower-case hexadecimal"),
    ],
)
def test_what_is_no_mask_is_refused(neurons: str, rule: str) -> None:
    with pytest.raises(PlanError, match=rule):
        plan_of(neurons)


def test_a_mask_of_another_width_is_refused() -> None:
    plan_of("80000", "80000", "f000f").validate(shape_of())
    for text, width in (("8000", WIDTH), ("80001", 19), ("800000", WIDTH)):
        with pytest.raises(PlanError, match=rf"expert 1 must be .* for its {width} neurons"):
            plan_of(
                "f" + "0" * (len(text) - 1) if width == 19 else "80000", text, "80000"
            ).validate(shape_of(width))


def test_neurons_go_with_neither_ranks_nor_members() -> None:
    with pytest.raises(PlanError, match=r"got neurons for the members \[0, 2\]. Merge with"):
        MergedExpert(members=(0, 2), neurons="80000")
    with pytest.raises(PlanError, match="layer 0: experts must either keep some"):
        plan_of("80000", None, ranks=((2, 2), (2, 2)))
    whole = tuple(MergedExpert(members=(expert,)) for expert in range(2))
    with pytest.raises(PlanError, match=r"ranks of layers \[1\] and neurons of layers \[0\]"):
        Plan(
            method="by hand",
            layers=(
                plan_of("80000", None).layers[0],
                LayerPlan(layer=1, experts=whole, ranks=((2, 2), (2, 2))),
            ),
            factors=Factors(method="svd"),
        )
