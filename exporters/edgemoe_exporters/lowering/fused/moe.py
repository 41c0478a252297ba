"""Routing and experts as onnxruntime's MoE and QMoE.

The graph chooses experts itself, in float32, exactly as the model does: the fused op then
gets, for each token, only the experts that were chosen, all others at minus infinity (MoE) or
with weight 0 (QMoE). It skips those, so an expert dropped by `k_cap` costs nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from edgemoe.errors import ExportError
from edgemoe_exporters.graph.builder import Emitter
from edgemoe_exporters.graph.editor import (
    Attribute,
    Editor,
    producer_of,
    required,
    size_of,
    sole_consumer,
)
from edgemoe_exporters.graph.lazy_weights import LazyWeight
from edgemoe_exporters.graph.metadata import DOMAIN, MICROSOFT
from edgemoe_exporters.graph.nodes import ExpertsNode, RouteNode
from edgemoe_exporters.lowering.fused.routing import Choice, choose
from edgemoe_exporters.lowering.primitive.dispatch import Slots
from edgemoe_exporters.lowering.primitive.factored import lower_factored_experts
from edgemoe_exporters.lowering.primitive.moe import lower_experts
from edgemoe_exporters.lowering.primitive.routing import lower_route
from edgemoe_exporters.lowering.quantize_once import quantize_later

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    import onnx_ir as ir

    from edgemoe_exporters.precision import Precision


@dataclass
class _Shared:
    """Values that all layers read: the caps, one per layer, and rows to scatter into."""

    caps: tuple[ir.Value, ...]
    rows: dict[tuple[int, float], ir.Value]


def lower_moe(editor: Editor, precision: Precision) -> None:
    """Replace every Route and the Experts that it feeds.

    Args:
        editor: The graph.
        precision: MoE for fp32 and fp16, QMoE for the others.

    Raises:
        ExportError: Experts are not fed by a Route, or cannot be quantised.
    """
    for node in editor.nodes("FactoredExperts", DOMAIN):
        _refuse_quantised(precision, None)
        _decompose(editor, node, precision, partial(lower_factored_experts, node=node))
    experts_nodes = list(editor.nodes("Experts", DOMAIN))
    if not experts_nodes:
        return
    route_nodes = [_route_of(node) for node in experts_nodes]
    routes = [RouteNode.of(node) for node in route_nodes]
    caps: tuple[ir.Value, ...] | None = None
    rows: dict[tuple[int, float], ir.Value] = {}
    for node, route_node, route in zip(experts_nodes, route_nodes, routes, strict=True):
        experts = ExpertsNode.of(node)
        if not experts.activation.is_swiglu:
            _refuse_quantised(precision, experts.activation.kind)
            _decompose(editor, node, precision, partial(lower_experts, experts=experts))
            continue
        caps = caps or _split_caps(editor, routes)
        choice = choose(editor, route_node, route, caps, precision)
        if route.counts:
            count = choice.count(editor, route_node, caps[route.k_cap_index])
            editor.replace(route_node.outputs[2], count)
        lower = _lower_to_qmoe if precision.bits else _lower_to_moe
        lower(_FusedLayer(editor, node, experts, route, choice, _Shared(caps, rows), precision))


def _route_of(node: ir.Node) -> ir.Node:
    route = producer_of(node.inputs[1], "Route", DOMAIN)
    if route is None:
        raise ExportError("experts must be chosen by a router, got other weights. Trace again.")
    return route


def _decompose(
    editor: Editor,
    node: ir.Node,
    precision: Precision,
    lower: Callable[..., list[ir.Value]],
) -> None:
    """Decompose experts that no fused op knows into primitive ops."""
    slots = _decompose_route(editor, _route_of(node), precision)
    emit = Emitter(editor.graph, precision.dtype, f"{node.name or 'experts'}")
    (output,) = lower(emit, slots=slots)
    editor.graph.insert_before(node, emit.nodes)
    editor.replace(node.outputs[0], output)


def _refuse_quantised(precision: Precision, activation: str | None) -> None:
    """Refuse a precision that only fused ops have; None stands for factored experts."""
    if precision.bits and activation is None:
        raise ExportError(
            f"experts must be whole to be quantised, got factored ones in {precision.name}. "
            "Export with --precision fp32 or fp16."
        )
    if precision.bits:
        raise ExportError(
            f"{precision.name} must have SwiGLU experts, got the activation {activation}: "
            "onnxruntime has no quantised op for it. Export with --precision fp32 or fp16."
        )


def _decompose_route(editor: Editor, route: ir.Node, precision: Precision) -> Slots:
    emit = Emitter(editor.graph, precision.dtype, f"{route.name or 'route'}")
    lowered, max_used = lower_route(emit, RouteNode.of(route))
    editor.graph.insert_before(route, emit.nodes)
    for old, new in zip(route.outputs, lowered, strict=True):
        new.shape = old.shape
        editor.replace(old, new)
    gates, indices, *_ = lowered
    return Slots(indices=indices, gates=gates, max_used=max_used)


def _split_caps(editor: Editor, routes: list[RouteNode]) -> tuple[ir.Value, ...]:
    """Clamp `k_cap` to [1, top_k] and split it, at the graph's start."""
    first = editor.graph[0]
    caps = routes[0].k_cap
    layers = size_of(caps, 0)
    limits = np.ones(layers, dtype=np.int64)
    for route in routes:
        limits[route.k_cap_index] = route.top_k
    (low,) = editor.add(
        first, "Max", [caps, editor.constant("one_int64", np.array(1, dtype=np.int64))]
    )
    (used,) = editor.add(first, "Min", [low, editor.constant("top_k", limits)])
    if layers == 1:
        return (used,)
    return editor.add(
        first, "Split", [used], {"axis": 0, "num_outputs": layers}, outputs=layers
    )


def _rows(editor: Editor, shared: _Shared, experts: int, fill: float) -> ir.Value:
    """Return float32 `[T, E]` of one number, computed once per run."""
    key = (experts, fill)
    if key not in shared.rows:
        first = editor.graph[0]
        tokens = next(value for value in editor.graph.inputs if value.name == "input_ids")
        (size,) = editor.add(first, "Size", [tokens])
        one_axis = editor.constant("ints_n1", np.array([-1], dtype=np.int64))
        (size,) = editor.add(first, "Reshape", [size, one_axis])
        width = editor.constant(f"ints_{experts}", np.array([experts], dtype=np.int64))
        (shape,) = editor.add(first, "Concat", [size, width], {"axis": 0})
        name = "zero" if fill == 0 else "minus_infinity"
        content = editor.constant(name, np.array(fill, dtype=np.float32))
        shared.rows[key] = editor.add(first, "Expand", [content, shape])[0]
    return shared.rows[key]


def _scatter(
    editor: Editor,
    before: ir.Node,
    choice: Choice,
    values: ir.Value,
    shared: _Shared,
    fill: float,
) -> ir.Value:
    rows = _rows(editor, shared, choice.experts + choice.idle, fill)
    inputs = [rows, choice.indices, values]
    (spread,) = editor.add(before, "ScatterElements", inputs, {"axis": 1})
    if not choice.idle:
        return spread
    ends = [
        editor.constant(f"ints_{number}", np.array([number], dtype=np.int64))
        for number in (0, choice.experts, 1)
    ]
    return editor.add(before, "Slice", [spread, *ends])[0]


def _token_shape(node: ir.Node) -> ir.Value:
    """Return the experts' input before it was flattened to tokens: the op takes both."""
    hidden = required(node.inputs[0])
    reshape = producer_of(hidden, "Reshape")
    return hidden if reshape is None else required(reshape.inputs[0])


def _replace_unflattened(
    editor: Editor, node: ir.Node, add_op: Callable[[ir.Value], ir.Value]
) -> None:
    """Put a fused op in the place of Experts and of the reshapes around it."""
    reshape = sole_consumer(node.outputs[0], "Reshape")
    hidden = _token_shape(node)
    if reshape is None or reshape.outputs[0].shape != hidden.shape:
        editor.replace(node.outputs[0], add_op(required(node.inputs[0])))
    else:
        editor.replace(reshape.outputs[0], add_op(hidden))


@dataclass(frozen=True)
class _FusedLayer:
    """One layer that becomes a fused op."""

    editor: Editor
    node: ir.Node
    experts: ExpertsNode
    route: RouteNode
    choice: Choice
    shared: _Shared
    precision: Precision

    def scaled(self, weights: LazyWeight) -> LazyWeight:
        """Multiply each expert's part `[E, ...]` by the factor of its gates."""
        scaling = self.route.rule.scaling_factor
        scale = self.route.expert_scale
        per_expert = None if scale is None else LazyWeight.of(scale)

        def multiply(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            factor = np.full(len(array), scaling, dtype=np.float32)
            if per_expert is not None:
                factor *= per_expert.compute().astype(np.float32)
            if (factor == 1).all():
                return array
            product = array * factor.reshape(-1, *[1] * (array.ndim - 1))
            return product.astype(np.float32, copy=False)

        return weights.map(multiply)

    @property
    def padding(self) -> int:
        """Intermediate channels of zeros added to fill the blocks of the second product."""
        width = self.experts.down_array().shape[-1]
        return -width % self.precision.block if self.precision.bits else 0

    def fc1(self) -> LazyWeight:
        return _pad(self.experts.gate_up_array().map(_interleave), 1, 2 * self.padding)

    def fc2(self) -> LazyWeight:
        return _pad(self.scaled(self.experts.down_array()), 2, self.padding)

    def biases(self) -> list[ir.Value | None]:
        """Return the biases of both products, as the fused ops take them."""
        first, second = self.experts.gate_up_bias_array(), self.experts.down_bias_array()
        if first is None or second is None:
            return [None, None]
        assert self.experts.gate_up_bias is not None
        assert self.experts.down_bias is not None
        return [
            _derived(
                self.editor,
                self.experts.gate_up_bias,
                "interleaved",
                _pad(
                    first.map(lambda array: _interleave(array[..., None])[..., 0]),
                    1,
                    2 * self.padding,
                ),
                self.precision,
            ),
            _derived(
                self.editor,
                self.experts.down_bias,
                "scaled",
                self.scaled(second),
                self.precision,
            ),
        ]

    @property
    def attributes(self) -> dict[str, Attribute]:
        """Attributes that MoE and QMoE share."""
        activation = self.experts.activation
        found: dict[str, Attribute] = {
            "k": self.route.top_k,
            "activation_type": "swiglu",
            "swiglu_fusion": 1,
            "activation_alpha": activation.alpha,
            "activation_beta": activation.beta,
            "normalize_routing_weights": 1,
        }
        if activation.limit < math.inf:
            found["swiglu_limit"] = activation.limit
        return found


def _lower_to_moe(layer: _FusedLayer) -> None:
    """Replace Experts by MoE: its softmax over the gates' logarithms gives the gates back.

    Gates that do not sum to one come back divided by their sum, so it is multiplied in.
    """
    editor, node, choice, precision = layer.editor, layer.node, layer.choice, layer.precision
    total: ir.Value | None = None
    values = choice.logits
    if values is None:
        weights = choice.weights(editor, node)
        (values,) = editor.add(node, "Log", [weights])
        if not choice.sums_to_one:
            axis = editor.constant("ints_1", np.array([1], dtype=np.int64))
            (total,) = editor.add(node, "ReduceSum", [weights, axis], {"keepdims": 1})
    logits = _scatter(editor, node, choice, values, layer.shared, -np.inf)
    if choice.idle:
        # A token may have no expert: its softmax is then of anything, times a sum of 0.
        zero = editor.constant("zero", np.array(0, dtype=np.float32))
        (is_empty,) = editor.add(node, "Equal", [required(total), zero])
        (logits,) = editor.add(node, "Where", [is_empty, zero, logits])
    logits = precision.cast(editor, node, logits)
    fc1 = _derived(editor, layer.experts.gate_up, "interleaved", layer.fc1(), precision)
    fc2 = _derived(editor, layer.experts.down, "scaled", layer.fc2(), precision)
    bias1, bias2 = layer.biases()

    def add_op(hidden: ir.Value) -> ir.Value:
        inputs = [hidden, logits, fc1, bias1, fc2, bias2]
        if bias2 is None:
            inputs.pop()
        return editor.add(node, "MoE", inputs, layer.attributes, domain=MICROSOFT)[0]

    if total is None:
        _replace_unflattened(editor, node, add_op)
        return
    total = precision.cast(editor, node, total)
    (output,) = editor.add(node, "Mul", [add_op(required(node.inputs[0])), total])
    editor.replace(node.outputs[0], output)


def _lower_to_qmoe(layer: _FusedLayer) -> None:
    """Replace Experts by QMoE, which takes gates as they are: one tensor chooses and weighs."""
    editor, node, choice, precision = layer.editor, layer.node, layer.choice, layer.precision
    weights: ir.Value | None = None
    if choice.logits is None:
        values = choice.weights(editor, node)
        rows = weights = _scatter(editor, node, choice, values, layer.shared, 0.0)
    else:
        rows = _scatter(editor, node, choice, choice.logits, layer.shared, -np.inf)
    fc1 = _blocks(editor, layer.experts.gate_up, layer.fc1(), precision)
    fc2 = _blocks(editor, layer.experts.down, layer.fc2(), precision)
    bias1, bias2 = layer.biases()
    inputs = [rows, fc1[0], fc1[1], bias1, fc2[0], fc2[1], bias2, None, None, None]
    inputs += [fc1[2], fc2[2], None, weights]
    attributes = {
        **layer.attributes,
        "expert_weight_bits": precision.bits,
        "block_size": precision.block,
        "accuracy_level": precision.accuracy_level,
        # It would divide even the gates that it is given by their sum.
        "normalize_routing_weights": int(weights is None),
    }

    def add_op(hidden: ir.Value) -> ir.Value:
        trimmed = [hidden, *inputs]
        while trimmed[-1] is None:
            trimmed.pop()
        return editor.add(node, "QMoE", trimmed, attributes, domain=MICROSOFT)[0]

    _replace_unflattened(editor, node, add_op)


def _interleave(gate_up: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Alternate gate and up rows: `[E, 2I, H]` with gate first to gate, up, gate, up."""
    experts, rows, hidden = gate_up.shape
    pairs = gate_up.reshape(experts, 2, rows // 2, hidden).swapaxes(1, 2)
    return np.ascontiguousarray(pairs).reshape(experts, rows, hidden)


def _pad(weights: LazyWeight, axis: int, zeros: int) -> LazyWeight:
    """Add zeros to the end of an axis."""
    if not zeros:
        return weights
    shape = list(weights.shape)
    shape[axis] += zeros
    missing = [(0, zeros if n == axis else 0) for n in range(len(shape))]
    return weights.map(lambda array: np.pad(array, missing), shape)


def _derived(
    editor: Editor,
    source: ir.Value,
    suffix: str,
    content: LazyWeight,
    precision: Precision,
) -> ir.Value:
    name = f"{source.name}.{suffix}"
    tensor = content.tensor(name, precision.dtype)
    return editor.initializer(name, tensor, dict(source.metadata_props))


def _blocks(
    editor: Editor, source: ir.Value, content: LazyWeight, precision: Precision
) -> tuple[ir.Value, ir.Value, ir.Value | None]:
    if content.shape[-1] % precision.block:
        raise ExportError(
            f"{source.name} must have rows divisible by {precision.block} to be quantised, got "
            f"{content.shape[-1]} columns. Export with precision fp32 or fp16."
        )
    parts = quantize_later(
        editor.latest, content, precision.bits, precision.block, precision.symmetric
    )
    values = []
    for part, array in parts.items():
        name = f"{source.name}.{'quantised' if part == 'packed' else part}"
        values.append(editor.initializer(name, array.tensor(name), dict(source.metadata_props)))
    return values[0], values[1], values[2] if len(values) == 3 else None
