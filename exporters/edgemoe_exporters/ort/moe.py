"""Routing and experts as onnxruntime's MoE and QMoE.

The graph chooses experts itself, in float32, exactly as the model does: the fused op then
gets, for each token, only the experts that were chosen, all others at minus infinity (MoE) or
with weight 0 (QMoE). It skips those, so an expert dropped by ``k_cap`` costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from edgemoe.errors import ExportError
from edgemoe_exporters.ort.editor import (
    MICROSOFT,
    TRACED,
    Attribute,
    Editor,
    array_of,
    producer_of,
    required,
    size_of,
    sole_consumer,
)
from edgemoe_exporters.ort.routing import Choice, choose
from edgemoe_exporters.quantize_once import quantize

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from edgemoe_exporters.ort.precision import Precision


@dataclass
class _Shared:
    """What all layers read: the caps, one value per layer, and rows to scatter into."""

    caps: tuple[ir.Value, ...]
    rows: dict[tuple[int, float], ir.Value] = field(default_factory=dict)


def lower_moe(editor: Editor, precision: Precision) -> None:
    """Replace every Route and the Experts that it feeds.

    Args:
        editor: The graph.
        precision: MoE for fp32 and fp16, QMoE for the others.

    Raises:
        ExportError: Experts are not fed by a Route, or cannot be quantised.
    """
    experts_nodes = list(editor.nodes("Experts", TRACED))
    if not experts_nodes:
        return
    routes = [_route_of(node) for node in experts_nodes]
    shared = _Shared(_split_caps(editor, routes))
    for node, route in zip(experts_nodes, routes, strict=True):
        choice = choose(editor, route, shared.caps, precision)
        lower = _quantised if precision.bits else _plain
        lower(editor, node, route, choice, shared, precision)


def _route_of(node: ir.Node) -> ir.Node:
    route = producer_of(node.inputs[1], "Route", TRACED)
    if route is None or node.attributes["activation"].as_string() != "silu":
        raise ExportError(
            "experts must be chosen by a router and use silu to be lowered for onnxruntime, "
            f"got activation {node.attributes['activation'].as_string()!r}."
        )
    return route


def _split_caps(editor: Editor, routes: list[ir.Node]) -> tuple[ir.Value, ...]:
    """Clamp ``k_cap`` to [1, top_k] and split it, at the graph's start."""
    first = editor.graph[0]
    caps = required(routes[0].inputs[3])
    layers = size_of(caps, 0)
    limits = np.ones(layers, dtype=np.int64)
    for route in routes:
        limits[route.attributes["k_cap_index"].as_int()] = route.attributes["top_k"].as_int()
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
    """Return float32 ``[T, E]`` of one number, computed once per run."""
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
    rows = _rows(editor, shared, choice.experts, fill)
    return editor.add(before, "ScatterElements", [rows, choice.indices, values], {"axis": 1})[0]


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


def _plain(
    editor: Editor,
    node: ir.Node,
    route: ir.Node,
    choice: Choice,
    shared: _Shared,
    precision: Precision,
) -> None:
    """MoE takes a softmax over logits: the logarithms of the weights give them back.

    Weights that do not sum to one come back divided by their sum, so it is multiplied in.
    """
    total: ir.Value | None = None
    values = choice.logits
    if values is None:
        weights = choice.weights(editor, node)
        (values,) = editor.add(node, "Log", [weights])
        if not choice.sums_to_one:
            axis = editor.constant("ints_1", np.array([1], dtype=np.int64))
            (total,) = editor.add(node, "ReduceSum", [weights, axis], {"keepdims": 1})
            total = precision.cast(editor, node, total)
    logits = _scatter(editor, node, choice, values, shared, -np.inf)
    logits = precision.cast(editor, node, logits)
    gate_up, down = required(node.inputs[3]), required(node.inputs[4])
    fc1 = _derived(editor, gate_up, "interleaved", _interleave(array_of(gate_up)), precision)
    scaled = array_of(down) * np.float32(choice.scaling)
    fc2 = _derived(editor, down, "scaled", scaled, precision)
    attributes = {"k": route.attributes["top_k"].as_int(), **_SWIGLU}

    def add_op(hidden: ir.Value) -> ir.Value:
        inputs = [hidden, logits, fc1, None, fc2]
        return editor.add(node, "MoE", inputs, attributes, domain=MICROSOFT)[0]

    if total is None:
        _replace_unflattened(editor, node, add_op)
        return
    (output,) = editor.add(node, "Mul", [add_op(required(node.inputs[0])), total])
    editor.replace(node.outputs[0], output)


def _quantised(
    editor: Editor,
    node: ir.Node,
    route: ir.Node,
    choice: Choice,
    shared: _Shared,
    precision: Precision,
) -> None:
    """QMoE takes weights as they are, so the same rows choose and weigh."""
    weights: ir.Value | None = None
    if choice.logits is None:
        values = choice.weights(editor, node)
        rows = weights = _scatter(editor, node, choice, values, shared, 0.0)
    else:
        rows = _scatter(editor, node, choice, choice.logits, shared, -np.inf)
    gate_up, down = required(node.inputs[3]), required(node.inputs[4])
    fc1 = _blocks(editor, gate_up, _interleave(array_of(gate_up)), precision)
    fc2 = _blocks(editor, down, array_of(down) * np.float32(choice.scaling), precision)
    inputs = [rows, fc1[0], fc1[1], None, fc2[0], fc2[1], None, None, None, None]
    inputs += [fc1[2], fc2[2], None, weights]
    attributes = {
        "k": route.attributes["top_k"].as_int(),
        "expert_weight_bits": precision.bits,
        "block_size": precision.block,
        "accuracy_level": precision.accuracy_level,
        **_SWIGLU,
        # It would divide even the weights that it is given by their sum.
        "normalize_routing_weights": int(weights is None),
    }

    def add_op(hidden: ir.Value) -> ir.Value:
        trimmed = [hidden, *inputs]
        while trimmed[-1] is None:
            trimmed.pop()
        return editor.add(node, "QMoE", trimmed, attributes, domain=MICROSOFT)[0]

    _replace_unflattened(editor, node, add_op)


def _interleave(gate_up: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Alternate gate and up rows: ``[E, 2I, H]`` with gate first to gate, up, gate, up."""
    experts, rows, hidden = gate_up.shape
    pairs = gate_up.reshape(experts, 2, rows // 2, hidden).swapaxes(1, 2)
    return np.ascontiguousarray(pairs).reshape(experts, rows, hidden)


def _derived(
    editor: Editor,
    source: ir.Value,
    suffix: str,
    array: np.ndarray[Any, Any],
    precision: Precision,
) -> ir.Value:
    tensor = ir.tensor(array.astype(precision.numpy), name=f"{source.name}.{suffix}")
    return editor.initializer(f"{source.name}.{suffix}", tensor, dict(source.metadata_props))


def _blocks(
    editor: Editor, source: ir.Value, array: np.ndarray[Any, Any], precision: Precision
) -> tuple[ir.Value, ir.Value, ir.Value | None]:
    if array.shape[-1] % precision.block:
        raise ExportError(
            f"{source.name} must have rows divisible by {precision.block} to be quantised, got "
            f"{array.shape[-1]} columns. Export with precision fp32 or fp16."
        )
    quantised = quantize(array, precision.bits, precision.block, precision.symmetric)
    parts = {"quantised": quantised.packed, "scales": quantised.scales}
    if quantised.zero_points is not None:
        parts["zero_points"] = quantised.zero_points
    values = [
        editor.initializer(
            f"{source.name}.{part}", ir.tensor(content), dict(source.metadata_props)
        )
        for part, content in parts.items()
    ]
    return values[0], values[1], values[2] if len(values) == 3 else None


_SWIGLU: dict[str, Attribute] = {
    "activation_type": "swiglu",
    "swiglu_fusion": 1,
    "activation_alpha": 1.0,
    "activation_beta": 0.0,
    "normalize_routing_weights": 1,
}
