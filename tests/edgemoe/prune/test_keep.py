"""Keep counts: rounding, lists, and what is refused before anything costly."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgemoe.errors import PlanError
from edgemoe.models.shapes import LayerShape, ModelShape
from edgemoe.prune.keep import count_kept, parse_keep_experts

SHAPE = ModelShape(
    family="glm4_moe",
    layers=(
        LayerShape(layer=1, num_experts=16, top_k=6),
        LayerShape(layer=2, num_experts=10, top_k=6),
    ),
    hidden_size=8,
    intermediate_size=4,
)


def test_fractions_numbers_and_lists() -> None:
    assert count_kept(SHAPE, keep=1.0) == (16, 10)
    assert count_kept(SHAPE, keep=0.75) == (12, 8)
    assert count_kept(SHAPE, keep=0.65) == (10, 7)
    assert count_kept(SHAPE, keep_experts=8) == (8, 8)
    assert count_kept(SHAPE, keep_experts=[16, 6]) == (16, 6)


@given(st.floats(0.6, 1))
def test_fractions_are_rounded_to_the_nearest(keep: float) -> None:
    for count, layer in zip(count_kept(SHAPE, keep=keep), SHAPE.layers, strict=True):
        assert abs(count - keep * layer.num_experts) <= 0.5


def test_impossible_counts_are_refused() -> None:
    with pytest.raises(PlanError, match=r"layer 1 .* at least 6 .* top_k=6, got 4"):
        count_kept(SHAPE, keep=0.25)
    with pytest.raises(PlanError, match=r"layer 2 .* top_k=6, got 5"):
        count_kept(SHAPE, keep_experts=[8, 5])
    with pytest.raises(PlanError, match=r"layer 2 .* at most its 10"):
        count_kept(SHAPE, keep_experts=12)
    with pytest.raises(PlanError, match="each of the 2 MoE layers, got 3"):
        count_kept(SHAPE, keep_experts=[8, 8, 8])
    for keep in (0.0, 1.01, -1.0, float("nan"), 8.0):
        with pytest.raises(PlanError, match=r"in \(0, 1\]"):
            count_kept(SHAPE, keep=keep)
    with pytest.raises(PlanError, match="one of --keep"):
        count_kept(SHAPE)
    with pytest.raises(PlanError, match="one of --keep"):
        count_kept(SHAPE, keep=0.5, keep_experts=8)
    grouped = replace(SHAPE.layers[0], top_k=2, n_group=4, min_group_size=2)
    shape = replace(SHAPE, layers=(grouped,))
    assert count_kept(shape, keep_experts=8) == (8,)
    told = r"each of its 4 router groups, got 9 in all. Use --keep-experts 8 or 12\."
    with pytest.raises(PlanError, match=told):
        count_kept(shape, keep_experts=9)
    # A fraction is rounded to whole groups: 9.6 and 10.4 of 16.
    assert count_kept(shape, keep=0.6) == (8,)
    assert count_kept(shape, keep=0.65) == (12,)
    # Of one group that a token may use it uses four experts.
    shape = replace(SHAPE, layers=(replace(grouped, top_k=4, min_group_size=3),))
    told = r"at least 12 of its 16 .* needs 3 experts in each of 4 groups .*"
    with pytest.raises(PlanError, match=told + r"--keep 0\.75 or --keep-experts 12"):
        count_kept(shape, keep=0.5)
    assert count_kept(shape, keep=0.75) == (12,)


def test_lists_come_from_text_or_a_file(tmp_path: Path) -> None:
    assert parse_keep_experts("8") == 8
    assert parse_keep_experts("8, 12,16") == (8, 12, 16)
    path = tmp_path / "counts.json"
    path.write_text(json.dumps([8, 12]))
    assert parse_keep_experts(str(path)) == (8, 12)
    for content in ("8", "[8.0]", "[true]", "{", "[[8]]"):
        path.write_text(content)
        with pytest.raises(PlanError, match="list of integers"):
            parse_keep_experts(str(path))
    for text in ("", "8,", "x", "0.5", str(tmp_path / "none.json")):
        with pytest.raises(PlanError, match="must be a number"):
            parse_keep_experts(text)
