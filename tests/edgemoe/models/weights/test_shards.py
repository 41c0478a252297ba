from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from edgemoe.models.stored_tensors import DTYPE_NAMES, as_bytes, read_stored_tensors
from edgemoe.models.weights.shards import PlannedTensor, ShardWriter, lay_out


def to_bytes(tensor: torch.Tensor) -> bytes:
    return bytes(as_bytes(tensor)) if tensor.numel() else b""


@st.composite
def planned(draw: st.DrawFn) -> list[PlannedTensor]:
    layers: list[int | None] = [None, *range(draw(st.integers(0, 4)))]
    return [
        PlannedTensor(
            name=f"{layer}.{number}é",
            dtype=draw(st.sampled_from(list(DTYPE_NAMES))),
            shape=tuple(draw(st.lists(st.integers(0, 5), max_size=2))),
            layer=layer,
        )
        for layer in layers
        for number in range(draw(st.integers(1, 4)))
    ]


@settings(max_examples=60, deadline=None)
@given(tensors=planned(), limit=st.integers(1, 400))
def test_shards_hold_everything_once_and_layers_together(
    tensors: list[PlannedTensor], limit: int
) -> None:
    shards = lay_out(tensors, limit)

    assert [tensor for shard in shards for tensor in shard.tensors] == tensors
    for shard in shards:
        assert shard.nbytes <= limit or len([t for t in shard.tensors if t.nbytes]) == 1
    for layer in {tensor.layer for tensor in tensors if tensor.layer is not None}:
        size = sum(tensor.nbytes for tensor in tensors if tensor.layer == layer)
        homes = [s for s in shards if any(t.layer == layer for t in s.tensors)]
        assert size > limit or len(homes) == 1


@settings(max_examples=40, deadline=None)
@given(tensors=planned(), data=st.data())
def test_the_library_reads_what_was_written_in_any_order(
    tensors: list[PlannedTensor], data: st.DataObject
) -> None:
    (shard,) = lay_out(tensors, 1 << 20)
    contents = {
        tensor.name: (torch.rand(tensor.shape) * 9).to(tensor.dtype) for tensor in tensors
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / shard.name
        with file.open("wb") as stream:
            writer = ShardWriter(stream, shard)
            for tensor in data.draw(st.permutations(tensors)):
                writer.write(tensor, contents[tensor.name])
            stream.seek(0, 2)

        found = load_file(file)
        stored = read_stored_tensors([file])

        assert found.keys() == stored.keys() == contents.keys()
        for name, content in contents.items():
            for other in (found[name], stored[name].read()):
                assert (other.dtype, other.shape) == (content.dtype, content.shape)
                assert to_bytes(other) == to_bytes(content)
            assert b"".join(stored[name].read_chunks()) == to_bytes(content)
