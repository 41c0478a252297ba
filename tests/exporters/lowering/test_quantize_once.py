"""Remembered quantisation: the same numbers, computed once."""

from __future__ import annotations

import numpy as np
import pytest

from edgemoe_exporters.lowering import quantize_once
from edgemoe_exporters.lowering.quantize import Quantized, quantize_blocks
from edgemoe_exporters.lowering.quantize_once import quantization_cache, quantize

EXPERTS = np.random.default_rng(0).standard_normal((5, 6, 64)).astype(np.float32)


def assert_equal(got: Quantized, want: Quantized) -> None:
    np.testing.assert_array_equal(got.packed, want.packed)
    np.testing.assert_array_equal(got.scales, want.scales)
    assert (got.zero_points is None) == (want.zero_points is None)
    if want.zero_points is not None and got.zero_points is not None:
        np.testing.assert_array_equal(got.zero_points, want.zero_points)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("weight", [EXPERTS, EXPERTS[0]])
def test_numbers_are_those_of_quantize_blocks(
    weight: np.ndarray[tuple[int, ...], np.dtype[np.float32]], bits: int, symmetric: bool
) -> None:
    want = quantize_blocks(weight, bits, 32, symmetric)
    assert_equal(quantize(weight, bits, 32, symmetric), want)
    with quantization_cache():
        assert_equal(quantize(weight, bits, 32, symmetric), want)
        assert_equal(quantize(weight, bits, 32, symmetric), want)


def test_each_expert_is_quantised_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []

    def counting(
        weight: np.ndarray[tuple[int, ...], np.dtype[np.float32]],
        bits: int,
        block: int,
        symmetric: bool,
    ) -> Quantized:
        calls.append(weight.shape)
        return quantize_blocks(weight, bits, block, symmetric)

    monkeypatch.setattr(quantize_once, "quantize_blocks", counting)
    with quantization_cache():
        quantize(EXPERTS[[0, 1, 2]], 4, 32, False)
        quantize(EXPERTS[[2, 0, 4]], 4, 32, False)
        assert calls == [(6, 64)] * 4
        quantize(EXPERTS[:1], 8, 32, False)
        quantize(EXPERTS[:1], 8, 32, True)
    assert calls == [(6, 64)] * 6
    quantize(EXPERTS[:1], 4, 32, False)
    assert calls[-1] == (1, 6, 64)
