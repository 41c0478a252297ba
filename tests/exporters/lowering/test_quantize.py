"""Quantisation: packing, error bounds, and what onnxruntime's kernels make of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from edgemoe_exporters.lowering.quantize import quantize_blocks


def _run(nodes: Any, initializers: Any, feeds: Any) -> Any:
    kinds = {np.dtype(np.float32): 1, np.dtype(np.int64): 7}
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info(k, kinds[v.dtype], None) for k, v in feeds.items()],
        [helper.make_tensor_value_info("y", 1, None)],
        [numpy_helper.from_array(value, name) for name, value in initializers.items()],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return session.run(None, feeds)[0]


@given(
    seed=st.integers(0, 2**32 - 1),
    bits=st.sampled_from([4, 8]),
    block=st.sampled_from([16, 32]),
    symmetric=st.booleans(),
    offset=st.floats(-1, 1),
)
@settings(max_examples=40, deadline=None)
def test_error_is_below_that_of_rounding_over_the_range(
    dequantize_blocks: Any, seed: Any, bits: Any, block: Any, symmetric: Any, offset: Any
) -> None:
    rng = np.random.default_rng(seed)
    weight = (rng.normal(size=(2, 3, 3 * block)) + offset).astype(np.float32)
    quantised = quantize_blocks(weight, bits, block, symmetric)
    assert quantised.packed.shape == (2, 3, 3 * block * bits // 8)
    assert quantised.scales.shape == (2, 3, 3)
    assert (quantised.zero_points is None) == symmetric
    error = (dequantize_blocks(quantised, bits) - weight).reshape(2, 3, 3, block)
    blocks = weight.reshape(2, 3, 3, block)
    if symmetric:
        step = np.abs(blocks).max(-1) / ((1 << (bits - 1)) - 1)
    else:
        low = np.minimum(blocks.min(-1), 0)
        step = (np.maximum(blocks.max(-1), 0) - low) / ((1 << bits) - 1)
    # Rounding to the nearest level is at most half a step off; a zero point costs as much.
    assert (np.square(error).mean(-1) <= step**2 * 1.01).all()


@given(seed=st.integers(0, 2**32 - 1), bits=st.sampled_from([4, 8]))
@settings(max_examples=20, deadline=None)
def test_weights_on_the_grid_are_kept(dequantize_blocks: Any, seed: Any, bits: Any) -> None:
    rng = np.random.default_rng(seed)
    top = (1 << bits) - 1
    levels = rng.integers(0, top + 1, size=(4, 2, 32))
    levels[..., 0], levels[..., 1] = 0, top
    zeros = rng.integers(1, top, size=(4, 2, 1))
    scales = rng.uniform(0.01, 1, size=(4, 2, 1))
    weight = ((levels - zeros) * scales).reshape(4, 64).astype(np.float32)
    back = dequantize_blocks(quantize_blocks(weight, bits, 32, symmetric=False), bits)
    np.testing.assert_allclose(back, weight, rtol=0, atol=2e-5 * top)


def test_zero_blocks_stay_zero(dequantize_blocks: Any) -> None:
    weight = np.zeros((2, 64), dtype=np.float32)
    for symmetric in (False, True):
        back = dequantize_blocks(quantize_blocks(weight, 4, 32, symmetric), 4)
        np.testing.assert_allclose(back, 0, atol=1e-25)


def test_what_does_not_fit_is_refused() -> None:
    weight = np.zeros((2, 40), dtype=np.float32)
    with pytest.raises(ValueError, match="block divide the columns"):
        quantize_blocks(weight, 4, 32, symmetric=False)
    with pytest.raises(ValueError, match="bits must be 4 or 8"):
        quantize_blocks(weight, 3, 40, symmetric=False)


@pytest.mark.fused
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_kernels_read_the_layout(dequantize_blocks: Any, bits: Any, symmetric: Any) -> None:
    rng = np.random.default_rng(bits)
    weight = rng.normal(size=(48, 96)).astype(np.float32)
    quantised = quantize_blocks(weight, bits, 32, symmetric)
    expected = dequantize_blocks(quantised, bits)
    states = rng.normal(size=(5, 96)).astype(np.float32)
    zeros = [] if symmetric else ["z"]
    initializers: dict[str, Any] = {
        "b": quantised.packed.reshape(48, 3, -1),
        "flat": quantised.packed,
        "s": quantised.scales,
    }
    if not symmetric:
        initializers["z"] = quantised.zero_points
    product = helper.make_node(
        "MatMulNBits",
        ["x", "b", "s", *zeros],
        ["y"],
        domain="com.microsoft",
        N=48,
        K=96,
        bits=bits,
        block_size=32,
    )
    actual = _run([product], initializers, {"x": states})
    np.testing.assert_allclose(actual, states @ expected.T, atol=1e-4)
    gather = helper.make_node(
        "GatherBlockQuantized",
        ["flat", "i", "s", *zeros],
        ["y"],
        domain="com.microsoft",
        bits=bits,
        block_size=32,
        gather_axis=0,
        quantize_axis=1,
    )
    ids = np.array([[3, 47, 0]])
    np.testing.assert_array_equal(_run([gather], initializers, {"i": ids}), expected[ids])
