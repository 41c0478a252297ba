"""Weights that are computed when they are written."""

from __future__ import annotations

import resource

import numpy as np
import onnx_ir as ir
import pytest

from edgemoe.errors import ExportError
from edgemoe.models.memory_budget import default_limit
from edgemoe_exporters.graph.lazy_weights import LatestResult, LazyWeight
from edgemoe_exporters.lowering.quantize import quantize_blocks
from edgemoe_exporters.lowering.quantize_once import quantize_later


def test_nothing_is_computed_before_it_is_asked_for() -> None:
    calls: list[int] = []

    def compute() -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        calls.append(1)
        return np.ones((2, 3), np.float32)

    tensor = (
        LazyWeight((2, 3), ir.DataType.FLOAT, compute)
        .map(lambda array: array.T * 2, (3, 2))
        .tensor("weight", ir.DataType.FLOAT16)
    )
    assert (tuple(tensor.shape.numpy()), tensor.dtype) == ((3, 2), ir.DataType.FLOAT16)
    assert tensor.nbytes == 12
    assert calls == []
    assert tensor.numpy().tolist() == [[2, 2]] * 3
    assert tensor.numpy().dtype == np.float16
    assert len(calls) == 2  # nothing is kept


def test_numbers_beyond_the_type_are_refused_when_written() -> None:
    tensor = LazyWeight((1,), ir.DataType.FLOAT, lambda: np.array([1e6], np.float32)).tensor(
        "model.w", ir.DataType.FLOAT16
    )
    with pytest.raises(ExportError, match=r"range of float16, got 1e\+06 in model\.w"):
        tensor.tobytes()


def test_a_computed_value_is_no_weight() -> None:
    with pytest.raises(ExportError, match="must be a weight"):
        LazyWeight.of(ir.Value(name="sum"))


@pytest.mark.parametrize(("bits", "symmetric"), [(4, False), (8, False), (4, True)])
def test_parts_of_a_quantised_weight_are_made_together(bits: int, symmetric: bool) -> None:
    array = np.random.default_rng(0).standard_normal((2, 5, 64)).astype(np.float32)
    calls: list[int] = []

    def compute() -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        calls.append(1)
        return array

    latest = LatestResult()
    weight = LazyWeight(array.shape, ir.DataType.FLOAT, compute)
    parts = quantize_later(latest, weight, bits, 32, symmetric)
    expected = quantize_blocks(array, bits, 32, symmetric)
    assert ("zero_points" in parts) == (not symmetric)
    for name, part in parts.items():
        made = part.tensor(name).numpy()
        assert np.array_equal(made, getattr(expected, name))
        assert part.shape == made.shape
    assert len(calls) == 1
    latest.get(object(), lambda: expected)
    parts["packed"].compute()
    assert len(calls) == 2


def test_a_limit_on_the_process_limits_what_is_opened_whole() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    assert default_limit() > 0
    low = 64 << 30 if hard == resource.RLIM_INFINITY else hard
    try:
        resource.setrlimit(resource.RLIMIT_DATA, (low, hard))
        assert default_limit() <= low // 2
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def test_a_scalar_stays_one() -> None:
    tensor = LazyWeight((), ir.DataType.FLOAT, lambda: np.array(8.0, np.float32)).tensor(
        "scale"
    )
    assert tensor.numpy().shape == ()
