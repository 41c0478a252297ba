"""Which experts run, and on how many rows, against loops over tokens in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_ir.passes.common import TopologicalSortPass

from edgemoe.models.activation import Activation
from edgemoe_exporters.graph.builder import Emitter
from edgemoe_exporters.lowering.primitive.dispatch import (
    Dispatch,
    Grouped,
    Slots,
    run_dynamic,
    run_static,
)
from edgemoe_exporters.lowering.primitive.moe import Layer
from edgemoe_exporters.lowering.primitive.static_shapes import StaticLayer

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

HIDDEN, WIDTH = 8, 4
SWISH = Activation(kind="swish", gated=True)
Arrays = dict[str, "NDArray[Any]"]


def make_layers(
    emit: Emitter, experts: int, *, biased: bool
) -> tuple[Layer, StaticLayer, Arrays]:
    """A layer with random weights in both forms, and the weights."""
    random = np.random.default_rng(experts)
    arrays: Arrays = {
        "gate_up": random.normal(size=(experts, HIDDEN, 2 * WIDTH)),
        "down": random.normal(size=(experts, WIDTH, HIDDEN)),
    }
    if biased:
        arrays |= {
            "gate_up_bias": random.normal(size=(experts, 2 * WIDTH)),
            "down_bias": random.normal(size=(experts, HIDDEN)),
        }
    static = arrays | {"gate_up": arrays["gate_up"].transpose(0, 2, 1)}

    def values(prefix: str, content: Arrays) -> dict[str, Any]:
        found: dict[str, Any] = {"gate_up_bias": None, "down_bias": None}
        for name, array in content.items():
            tensor = ir.tensor(np.ascontiguousarray(array, np.float32), name=prefix + name)
            found[name] = ir.Value(
                name=prefix + name,
                shape=ir.Shape(array.shape),
                type=ir.TensorType(ir.DataType.FLOAT),
                const_value=tensor,
            )
            emit.graph.register_initializer(found[name])
        return found

    common: dict[str, Any] = {
        "hidden": emit.graph.inputs[0],
        "activation": SWISH,
        "experts": experts,
        "width": WIDTH,
        "hidden_size": HIDDEN,
    }
    layer = Layer(**common, **values("", arrays))
    return layer, StaticLayer(**common, **values("static_", static)), arrays


def run(
    experts: int,
    top_k: int,
    lower: Callable[[Emitter, Layer, StaticLayer, Slots], list[ir.Value]],
    feeds: Arrays,
    *,
    biased: bool = False,
) -> tuple[list[NDArray[Any]], Arrays]:
    """Lower a layer and run it in onnxruntime; also give its weights."""
    shapes: dict[str, list[int | str]] = {
        "hidden": ["T", HIDDEN],
        "indices": ["T", top_k],
        "gates": ["T", top_k],
        "max_used": [1],
    }
    kinds = {"indices": ir.DataType.INT64, "max_used": ir.DataType.INT64}
    inputs = [
        ir.Value(
            name=name,
            shape=ir.Shape(shape),
            type=ir.TensorType(kinds.get(name, ir.DataType.FLOAT)),
        )
        for name, shape in shapes.items()
    ]
    graph = ir.Graph(inputs, [], nodes=[], opset_imports={"": 20}, name="layer")
    emit = Emitter(graph, ir.DataType.FLOAT, "layer")
    layer, static, arrays = make_layers(emit, experts, biased=biased)
    slots = Slots(indices=inputs[1], gates=inputs[2], max_used=inputs[3])
    outputs = lower(emit, layer, static, slots)
    graph.extend(emit.nodes)
    graph.outputs.extend(outputs)
    model = ir.Model(graph, ir_version=10)
    TopologicalSortPass()(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3  # not every way needs all weights
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, feeds), arrays


def draw_feeds(seed: int, tokens: int, experts: int, top_k: int) -> Arrays:
    """Distinct experts for each token, which uses a first part of its slots, one at least."""
    random = np.random.default_rng(seed)
    indices = np.stack([random.permutation(experts)[:top_k] for _ in range(tokens)])
    used = random.integers(1, top_k + 1, tokens)
    gates = random.uniform(0.1, 1, (tokens, top_k)) * (np.arange(top_k) < used[:, None])
    # A gate that has become 0 in a slot that is used leaves the slots behind it where they are.
    gates[random.random(gates.shape) < 0.1] = 0.0
    return {
        "hidden": random.normal(size=(tokens, HIDDEN)).astype(np.float32),
        "indices": indices.astype(np.int64),
        "gates": gates.astype(np.float32),
        "max_used": np.array([used.max()]),
    }


def expected(feeds: Arrays, weights: Arrays) -> NDArray[np.float64]:
    """One expert of one token after the other, in float64."""
    output = np.zeros((len(feeds["hidden"]), HIDDEN))
    none = np.zeros(1)
    for token, row in enumerate(feeds["hidden"].astype(np.float64)):
        for expert, gate in zip(feeds["indices"][token], feeds["gates"][token], strict=True):
            bias = weights["gate_up_bias"][expert] if "gate_up_bias" in weights else none
            units = row @ weights["gate_up"][expert] + bias
            one, other = units[:WIDTH], units[WIDTH:]
            made = (one / (1 + np.exp(-one)) * other) @ weights["down"][expert]
            made = made + (weights["down_bias"][expert] if "down_bias" in weights else none)
            output[token] += float(gate) * made
    return output


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    tokens=st.integers(1, 12),
    experts=st.integers(1, 9),
    top_k=st.integers(1, 4),
    biased=st.booleans(),
)
def test_every_token_gets_what_its_experts_give(
    seed: int, tokens: int, experts: int, top_k: int, biased: bool
) -> None:
    top_k = min(top_k, experts)
    feeds = draw_feeds(seed, tokens, experts, top_k)

    def all_ways(
        emit: Emitter, layer: Layer, static: StaticLayer, slots: Slots
    ) -> list[ir.Value]:
        used = slots.in_use(emit)
        dispatch = Dispatch.of(emit, layer.hidden, used, experts)
        return [
            run_dynamic(emit, layer, slots),
            layer.gather(emit, used),
            layer.grouped(emit, dispatch),
            run_static(emit, static, slots),
            static.gather(emit, slots),
            static.dense(emit, slots),
        ]

    found, weights = run(experts, top_k, all_ways, feeds, biased=biased)
    for output in found:
        np.testing.assert_allclose(output, expected(feeds, weights), atol=2e-5)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    tokens=st.integers(1, 12),
    experts=st.integers(2, 9),
    top_k=st.integers(1, 4),
)
def test_what_no_token_uses_has_no_row(
    seed: int, tokens: int, experts: int, top_k: int
) -> None:
    top_k = min(top_k, experts)
    feeds = draw_feeds(seed, tokens, experts, top_k)

    def rows(emit: Emitter, layer: Layer, _: StaticLayer, slots: Slots) -> list[ir.Value]:
        used = slots.in_use(emit)
        return [used.indices, Dispatch.of(emit, layer.hidden, used, experts).rows]

    (indices, placed), _ = run(experts, top_k, rows, feeds)
    is_dispatched = feeds["gates"] != 0
    loads = np.bincount(feeds["indices"][is_dispatched], minlength=experts)
    assert indices.shape == (tokens, feeds["max_used"][0])
    assert placed.shape == (experts, max(loads.max(), 1), HIDDEN)


@pytest.mark.parametrize(
    ("tokens", "used", "copies"), [(1, 4, True), (2, 2, True), (2, 3, False)]
)
def test_experts_are_copied_while_that_moves_less(tokens: int, used: int, copies: bool) -> None:
    experts, top_k = 12, 4
    feeds = draw_feeds(7, tokens, experts, top_k)
    gates = np.where(np.arange(top_k) < used, 0.5, 0).astype(np.float32)
    feeds["gates"] = np.tile(gates, (tokens, 1))
    feeds["max_used"] = np.array([used])

    class Told:
        """Says which way was is_dispatched, in the place of an answer."""

        def __init__(self, layer: Grouped) -> None:
            self.hidden, self.experts = layer.hidden, layer.experts

        def gather(self, emit: Emitter, slots: Slots) -> ir.Value:
            del slots
            return emit.call("Mul", self.hidden, emit.number(1.0))

        def grouped(self, emit: Emitter, dispatch: Dispatch) -> ir.Value:
            del dispatch
            return emit.call("Mul", self.hidden, emit.number(0.0))

    def told(emit: Emitter, layer: Layer, _: StaticLayer, slots: Slots) -> list[ir.Value]:
        return [run_dynamic(emit, Told(layer), slots)]

    found, _ = run(experts, top_k, told, feeds)
    assert bool(found[0].any()) == copies
