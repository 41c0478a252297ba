"""Shapes that engines accept, for any limits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgemoe.errors import CompileError
from edgemoe_exporters.compiler.profiles import ShapeLimits, choose_limits, make_profile
from edgemoe_runtime.bundle.graph_spec import TensorSpec


def manifest(*extra: TensorSpec, positions: int = 4096) -> Any:
    inputs = (
        TensorSpec(name="input_ids", dtype="int64", shape=("batch", "sequence")),
        TensorSpec(name="attention_mask", dtype="int64", shape=("batch", "total")),
        TensorSpec(
            name="past_key_values.0.key", dtype="float16", shape=("batch", 3, "past", 64)
        ),
        TensorSpec(
            name="past_key_values.0.indexer_key", dtype="float16", shape=("batch", "past", 16)
        ),
        TensorSpec(
            name="past_key_values.1.conv_state", dtype="float32", shape=("batch", 64, 3)
        ),
        TensorSpec(name="k_cap", dtype="int64", shape=(2,)),
        *extra,
    )
    model = SimpleNamespace(max_position_embeddings=positions)
    return cast("Any", SimpleNamespace(inputs=inputs, model=model))


@given(batch=st.integers(1, 8), length=st.integers(1, 4096), sequence=st.integers(1, 4096))
def test_ranges_are_ordered_and_fit_together(batch: int, length: int, sequence: int) -> None:
    limits = ShapeLimits(max_batch=batch, max_sequence=min(sequence, length), max_length=length)
    profile = make_profile(manifest(), limits)
    cached = ["0.key", "0.indexer_key", "1.conv_state"]
    names = [f"past_key_values.{name}" for name in cached]
    assert set(profile) == {"input_ids", "attention_mask", *names}
    assert profile[names[2]] == ((1, 64, 3), (1, 64, 3), (batch, 64, 3))
    for shapes in profile.values():
        for low, best, high in zip(*shapes, strict=True):
            assert low <= best <= high
    for which in range(3):
        past = profile[names[0]][which][2]
        assert profile[names[1]][which][1:] == (past, 16)
        total = profile["attention_mask"][which][1]
        new = profile["input_ids"][which][1]
        assert total == min(past + new, length)


def test_an_input_that_sets_shapes_has_a_range_of_values() -> None:
    caps = TensorSpec(name="caps", dtype="int64", shape=(3,), sets_shapes=True)
    tasks = {"a": SimpleNamespace(top_k=2), "b": SimpleNamespace(top_k=5)}
    given: Any = SimpleNamespace(**vars(manifest(caps)), tasks=tasks)
    limits = ShapeLimits(max_batch=1, max_sequence=8, max_length=8)
    assert make_profile(given, limits)["caps"] == ((1,) * 3, (5,) * 3, (5,) * 3)
    many = ShapeLimits(max_batch=2, max_sequence=1920, max_length=4096)
    with pytest.raises(CompileError, match=r"at most 3839.*got 3840.*--static-shapes"):
        make_profile(given, many)
    assert "k_cap" not in make_profile(manifest(), many)


def test_defaults_follow_the_model() -> None:
    assert choose_limits(manifest(positions=100)).max_length == 100
    assert choose_limits(manifest()).max_length == 2048
    assert choose_limits(manifest()).max_batch == 1


def test_unknown_dynamic_input_is_refused() -> None:
    odd = TensorSpec(name="odd", dtype="int64", shape=("n",))
    limits = ShapeLimits(max_batch=1, max_sequence=1, max_length=1)
    with pytest.raises(CompileError, match="dimension 0 of input odd must have a fixed size"):
        make_profile(manifest(odd), limits)
