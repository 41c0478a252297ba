"""The wire reader against onnx itself, and against bytes that are no model."""

from __future__ import annotations

import contextlib
import random
from typing import TYPE_CHECKING

import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from edgemoe_runtime.bundle.onnx_wire import read_graph
from edgemoe_runtime.errors import IntegrityError

if TYPE_CHECKING:
    from pathlib import Path


def external(name: str) -> TensorProto:
    tensor = TensorProto(name=name, data_type=1, dims=[1])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", f"{name}.bin"), ("offset", "0"), ("length", "4")):
        tensor.external_data.add(key=key, value=value)
    return tensor


def hidden_everywhere() -> onnx.ModelProto:
    """Put an external tensor into every place where the format allows one."""
    inner = helper.make_graph([], "inner", [], [], [external("subgraph")])
    node = helper.make_node("If", ["c"], ["y"])
    node.attribute.append(helper.make_attribute("then_branch", inner))
    node.attribute.append(helper.make_attribute("graphs", [inner]))
    node.attribute.append(helper.make_attribute("value", external("attribute")))
    node.attribute.append(helper.make_attribute("values", [external("attributes")]))
    sparse = onnx.SparseTensorProto(
        values=external("sparse_values"), indices=external("sparse_indices"), dims=[4]
    )
    node.attribute.append(helper.make_attribute("sparse", sparse))
    node.attribute.append(helper.make_attribute("sparses", [sparse]))
    graph = helper.make_graph([node], "main", [], [], [external("initializer")])
    graph.sparse_initializer.append(sparse)
    model = helper.make_model(graph)
    function = onnx.FunctionProto(name="f", domain="d", output=["y"])
    constant = helper.make_node("Constant", [], ["y"])
    constant.attribute.append(helper.make_attribute("value", external("function")))
    function.node.append(constant)
    default = helper.make_attribute("value", external("function_default"))
    function.attribute_proto.append(default)
    model.functions.append(function)
    training = model.training_info.add()
    training.initialization.initializer.append(external("training_init"))
    training.algorithm.initializer.append(external("training_step"))
    return model


def test_no_hiding_place_is_missed() -> None:
    summary = read_graph(hidden_everywhere().SerializeToString(), "x.onnx")
    assert {tensor.name for tensor in summary.external} == {
        "subgraph", "attribute", "attributes", "sparse_values", "sparse_indices",
        "initializer", "function", "function_default", "training_init", "training_step",
    }  # fmt: skip
    assert all(dict(t.entries)["location"] == f"{t.name}.bin" for t in summary.external)
    assert summary.operators == {"If", "Constant"}


def test_entries_without_the_flag_are_found() -> None:
    tensor = external("quiet")
    tensor.ClearField("data_location")
    model = helper.make_model(helper.make_graph([], "g", [], [], [tensor]))
    assert read_graph(model.SerializeToString(), "x").external[0].name == "quiet"


def test_inputs_and_outputs_equal_onnx(bundles: dict[str, Path]) -> None:
    path = bundles["concat"] / "model.onnx"
    model = onnx.load(str(path), load_external_data=False)
    summary = read_graph(path.read_bytes(), "x")
    for found, expected in (
        (summary.inputs, model.graph.input),
        (summary.outputs, model.graph.output),
    ):
        assert [tensor.name for tensor in found] == [value.name for value in expected]
        for tensor, value in zip(found, expected, strict=True):
            dims = value.type.tensor_type.shape.dim
            assert tensor.shape == tuple(dim.dim_param or dim.dim_value for dim in dims)
    names = {t.name for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL}
    assert {tensor.name for tensor in summary.external} == names
    assert "Gather" in summary.operators


def test_a_tag_that_protobuf_reads_otherwise_is_refused() -> None:
    """protobuf for C++ drops the bits beyond 32: to an engine this is an initializer."""
    tensor = external("hidden").SerializeToString()
    tag = varint((1 << 32) | (5 << 3) | 2)
    graph = tag + varint(len(tensor)) + tensor
    with pytest.raises(IntegrityError, match="32 bits"):
        read_graph(bytes([7 << 3 | 2]) + varint(len(graph)) + graph, "x")


def test_deep_nesting_is_refused_without_recursion_errors() -> None:
    data = b""
    for _ in range(5000):  # graph in an attribute in a node in a graph
        attribute = b"\x32" + varint(len(data)) + data
        node = b"\x2a" + varint(len(attribute)) + attribute
        data = b"\x0a" + varint(len(node)) + node
    with pytest.raises(IntegrityError, match="deep"):
        read_graph(b"\x3a" + varint(len(data)) + data, "x")


def varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes(data: bytes) -> None:
    with contextlib.suppress(IntegrityError):
        read_graph(data, "x")


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 6))
def test_damaged_models(seed: int, count: int) -> None:
    data = bytearray(hidden_everywhere().SerializeToString())
    dice = random.Random(seed)
    for _ in range(count):
        place = dice.randrange(len(data))
        kind = dice.randrange(3)
        if kind == 0:
            data[place] = dice.randrange(256)
        elif kind == 1:
            del data[place : place + dice.randrange(1, 20)]
        else:
            data[place:place] = dice.randbytes(dice.randrange(1, 5))
    with contextlib.suppress(IntegrityError):
        read_graph(bytes(data), "x")
