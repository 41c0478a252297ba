from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgemoe.layerwise.outputs import LayerOutputs

TENSORS = st.builds(
    lambda shape, dtype: (torch.rand(shape) * 9).to(dtype),
    st.lists(st.integers(0, 4), max_size=3).map(tuple),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]),
)
OUTPUTS = st.recursive(
    st.one_of(TENSORS, st.none()),
    lambda inner: st.lists(inner, max_size=3).map(tuple),
    max_leaves=4,
)


def assert_equal(found: Any, wanted: Any) -> None:
    if isinstance(wanted, torch.Tensor):
        assert found.dtype == wanted.dtype
        assert torch.equal(found, wanted)
    elif wanted is None:
        assert found is None
    else:
        assert isinstance(found, tuple)
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert_equal(one, other)


@settings(max_examples=40, deadline=None)
@given(batches=st.lists(OUTPUTS, max_size=6), limit=st.integers(0, 200))
def test_what_was_put_in_comes_out_in_order(batches: list[Any], limit: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        outputs = LayerOutputs(Path(folder), limit)
        for batch in batches:
            outputs.append(batch)
        outputs.finish()

        for found in (list(outputs), list(outputs), list(LayerOutputs.reopen(Path(folder)))):
            assert len(found) == len(batches)
            for one, other in zip(found, batches, strict=True):
                assert_equal(one, other)
