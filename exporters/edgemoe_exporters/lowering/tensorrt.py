"""Lower a traced model to a graph that TensorRT builds: primitive ops, opset 20 at most.

The graph is strongly typed. In fp16, weights and activations are float16; router, norms,
softmax and angles are float32, and so are the logits. The cache grows by Concat.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir
from onnx_ir.passes import common as passes

from edgemoe.errors import ExportError
from edgemoe_exporters.graph.builder import FLOAT32, Emitter, size_of
from edgemoe_exporters.graph.editor import required
from edgemoe_exporters.graph.initializers import narrow_attributes, set_weight, state_values
from edgemoe_exporters.graph.lazy_weights import LazyWeight
from edgemoe_exporters.graph.metadata import DOMAIN, SETS_SHAPES
from edgemoe_exporters.graph.nodes import ExpertsNode, RouteNode
from edgemoe_exporters.lowering.primitive.attention import Shared
from edgemoe_exporters.lowering.primitive.dispatch import MAX_SHAPE_NUMBERS, Slots
from edgemoe_exporters.lowering.primitive.factored import lower_factored_experts
from edgemoe_exporters.lowering.primitive.moe import lower_experts
from edgemoe_exporters.lowering.primitive.routing import lower_route
from edgemoe_exporters.lowering.primitive.table import LOWERINGS, SHARING

if TYPE_CHECKING:
    from collections.abc import Sequence


MAX_OPSET = 20
_IR_VERSION = 10
_COMPUTE = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16}
# Inputs of custom ops that stay float32, by position.
_WIDE_INPUTS = {
    "Route": (1, 2, 3, 4, 7, 8),
    "RotaryEmbedding": (2,),
    "Angles": (1,),
    "RMSNorm": (1,),
}
_LOGITS = "logits"


def lower(model: ir.Model, precision: str, *, static_shapes: bool = False) -> ir.Model:
    """Decompose the custom ops of a traced model into primitive ops that TensorRT builds.

    Args:
        model: What `tracing.trace.trace` made; it is changed.
        precision: `fp32` or `fp16`.
        static_shapes: Whether to avoid shapes that depend on how many experts tokens use. It
            costs the time that a smaller k would save, and is for a TensorRT that refuses the
            other graph. Graphs with recurrent layers, or with more than 64 MoE layers, never
            have such shapes.

    Returns:
        The same model, lowered.

    Raises:
        ExportError: The precision, an op or an activation has no TensorRT form.
    """
    if precision not in _COMPUTE:
        raise ExportError(
            f"precision of a TensorRT target must be one of {', '.join(_COMPUTE)}, got "
            f"{precision!r}: opset {MAX_OPSET}, the newest that JetPack 6.2 parses, has no "
            "block-wise int4 or int8 weights. Use --precision fp16."
        )
    graph = model.graph
    compute = _COMPUTE[precision]
    if compute != FLOAT32:
        _narrow(graph, compute)
    _lower_nodes(graph, compute, static_shapes=static_shapes)
    _restore_logits(graph)
    model.opset_imports.pop(DOMAIN, None)
    opset = model.opset_imports[""]
    if opset > MAX_OPSET:
        raise ExportError(f"opset of a TensorRT graph must be <= {MAX_OPSET}, got {opset}.")
    model.ir_version = min(model.ir_version, _IR_VERSION)
    passes.RemoveUnusedNodesPass()(model)
    passes.TopologicalSortPass()(model)
    return model


def _narrow(graph: ir.Graph, compute: ir.DataType) -> None:
    """Convert float weights, cache and the float part of the graph to `compute`."""
    kept = {
        node.inputs[index]
        for node in graph
        if node.domain == DOMAIN
        for index in _WIDE_INPUTS.get(node.op_type, ())
        if index < len(node.inputs)
    } | state_values(graph)
    for value in graph.initializers.values():
        if value.dtype == FLOAT32 and value not in kept:
            set_weight(value, LazyWeight.of(value), compute)
    for value in graph.inputs:
        if value.dtype == FLOAT32 and value not in kept:
            value.dtype = compute
    for node in graph:
        narrow_attributes(node, compute)
        for value in node.outputs:
            if value.dtype == FLOAT32 and value not in kept:
                value.dtype = compute


def _lower_nodes(graph: ir.Graph, compute: ir.DataType, *, static_shapes: bool) -> None:
    shared = Shared()
    # TensorRT for RTX 1.7 has an internal error with data-dependent shapes beside a Scan, and
    # with those that follow from one cap in several places: layers that run several times.
    routes = [node.attributes["k_cap_index"].as_int() for node in graph if _is_route(node)]
    allow_dynamic = (
        not static_shapes
        and not any(node.op_type == "LinearAttention" for node in graph)
        and len(set(routes)) == len(routes)
    )
    chosen: dict[ir.Value, Slots] = {}
    for node in list(graph):
        if node.domain != DOMAIN:
            continue
        emit = Emitter(graph, compute, str(node.name or node.op_type))
        if node.op_type == "Route":
            route = RouteNode.of(node)
            outputs, max_used = lower_route(emit, route)
            gates, indices, *_ = outputs
            dynamic = allow_dynamic and size_of(route.k_cap, 0) <= MAX_SHAPE_NUMBERS
            if dynamic:
                route.k_cap.metadata_props[SETS_SHAPES] = "1"
            chosen[gates] = Slots(
                indices=indices, gates=gates, max_used=max_used if dynamic else None
            )
        elif node.op_type in ("Experts", "FactoredExperts"):
            slots = chosen.get(required(node.inputs[2]))
            if slots is None:
                raise ExportError(f"{node.name} must get its weights from a Route node.")
            if node.op_type == "Experts":
                outputs = lower_experts(emit, ExpertsNode.of(node), slots)
            else:
                outputs = lower_factored_experts(emit, node, slots)
        elif node.op_type in LOWERINGS:
            outputs = LOWERINGS[node.op_type](emit, node)
        elif node.op_type in SHARING:
            outputs = SHARING[node.op_type](emit, node, shared)
        else:
            raise ExportError(f"op {node.op_type} must have a TensorRT form, and has none.")
        _replace(graph, node, emit.nodes, outputs)


def _is_route(node: ir.Node) -> bool:
    return node.domain == DOMAIN and node.op_type == "Route"


def _replace(
    graph: ir.Graph, node: ir.Node, nodes: Sequence[ir.Node], outputs: Sequence[ir.Value]
) -> None:
    graph.insert_before(node, nodes)
    for old, new in zip(node.outputs, outputs, strict=True):
        new.shape = old.shape
        new.type = new.type or old.type
        if old.is_graph_output():
            new.name = old.name
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _restore_logits(graph: ir.Graph) -> None:
    """Cast the logits to float32, as every sampler wants them."""
    for index, value in enumerate(graph.outputs):
        if value.name == _LOGITS and value.dtype != FLOAT32:
            node = ir.node("Cast", [value], attributes={"to": FLOAT32}, name="logits/Cast")
            wide = node.outputs[0]
            wide.shape, wide.type = value.shape, ir.TensorType(FLOAT32)
            value.name, wide.name = "logits_narrow", _LOGITS
            graph.append(node)
            graph.outputs[index] = wide
