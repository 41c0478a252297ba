"""Routing and experts as onnxruntime's MoE and QMoE.

The graph chooses experts itself, in float32, exactly as the model does: the fused op then
gets, for each token, only the experts that were chosen, all others at minus infinity (MoE) or
with weight 0 (QMoE). It skips those, so an expert dropped by `k_cap` costs nothing.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from edgemoe.errors import ExportError
from edgemoe_exporters.graph.builder import FLOAT32, Emitter
from edgemoe_exporters.graph.editor import Editor, producer_of, size_of
from edgemoe_exporters.graph.metadata import DOMAIN
from edgemoe_exporters.graph.nodes import ExpertsNode, RouteNode
from edgemoe_exporters.lowering.fused.experts import (
    FusedLayer,
    Shared,
    lower_to_moe,
    lower_to_qmoe,
)
from edgemoe_exporters.lowering.fused.routing import Choice, choose
from edgemoe_exporters.lowering.primitive.dispatch import Slots
from edgemoe_exporters.lowering.primitive.factored import lower_factored_experts
from edgemoe_exporters.lowering.primitive.moe import lower_experts
from edgemoe_exporters.lowering.primitive.routing import lower_route

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgemoe_exporters.precision import Precision


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
        if route.rule.shared:
            _give_weights(editor, route_node, choice, route.rule.scaling_factor)
        if route.counts:
            count = choice.count(editor, route_node, caps[route.k_cap_index])
            editor.replace(route_node.outputs[2], count)
        lower = lower_to_qmoe if precision.bits else lower_to_moe
        lower(FusedLayer(editor, node, experts, route, choice, Shared(caps, rows), precision))


def _give_weights(editor: Editor, route: ir.Node, choice: Choice, scaling: float) -> None:
    """Compute the weights themselves, which not only the experts read."""
    weights = choice.weights(editor, route)
    if scaling != 1.0:
        factor = editor.constant(f"scaling_{scaling:g}", np.array(scaling, dtype=np.float32))
        (weights,) = editor.add(route, "Mul", [weights, factor])
    # Whatever the type of activations is.
    weights.type = ir.TensorType(FLOAT32)
    editor.replace(route.outputs[0], weights)


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
