"""Experts in ops that TensorRT builds.

TensorRT builds neither com.microsoft.MoE nor scatter-add nor NonZero, and its own MoE layer
exists on data-centre Blackwell and Jetson Thor only. That leaves three ways (E experts, k per
token, T tokens):

- *dense*: all experts of a layer are one wide feed-forward network, whose hidden units are
  multiplied by the gate of their expert, or 0. Two matrix products per layer whatever E is,
  no data-dependent shape, and the weights stay as the checkpoint stacks them. It reads and
  multiplies E experts.
- *gather*: copy the k experts of each token, then multiply. A copy reads and writes and the
  product reads again, so this moves 3 T k experts.
- *sorted*: group tokens by expert. About 15 nodes per expert and layer and data-dependent
  shapes: 7000 nodes for 16 experts in 30 layers. Not used.

So dense is the cheapest at any T where E <= 3 k, which holds for what pruning leaves; beyond
it, each layer chooses as it runs: gather while 3 T k <= E, as when generating, dense above.
This counts weight traffic; no GPU has run it yet.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import onnx_ir as ir

from edgemoe_exporters.bundle import EXPERT_AXIS_KEY, LAYER_KEY
from edgemoe_exporters.initializers import set_weight
from edgemoe_exporters.lower_tensorrt_emit import Emitter, size_of
from edgemoe_exporters.lower_tensorrt_route import where

if TYPE_CHECKING:
    from edgemoe.models.activation import Activation
    from edgemoe_exporters.nodes import ExpertsNode

ExpertsForm = Literal["auto", "dense", "gather"]

# A gathered expert is read, written and read again.
GATHER_TRAFFIC = 3
_LAYER = re.compile(r"\.layers\.(\d+)\.")


def lower_experts(emit: Emitter, experts: ExpertsNode, form: ExpertsForm) -> list[ir.Value]:
    """Run the chosen experts.

    Args:
        emit: Takes the nodes.
        experts: An Experts node; its weights are what a lowered Route gave: float32
            ``[T, k]``, 0 where a slot is not used.
        form: How; ``auto`` as the module says.

    Returns:
        Output ``[T, H]``.
    """
    gate_up, down = experts.gate_up, experts.down
    # [E, I, H]: the dense form's second product reads it as it lies.
    set_weight(down, experts.down_array().transpose(0, 2, 1))
    set_weight(gate_up, experts.gate_up_array())
    bias = experts.gate_up_bias_array()
    if bias is not None and experts.gate_up_bias is not None:
        set_weight(experts.gate_up_bias, bias)
    for value in (gate_up, down, experts.gate_up_bias, experts.down_bias):
        if value is not None:
            mark_experts(value)
    layer = _Layer(
        hidden=experts.hidden,
        indices=experts.indices,
        gates=experts.weights,
        gate_up=gate_up,
        down=down,
        gate_up_bias=experts.gate_up_bias,
        down_bias=experts.down_bias,
        activation=experts.activation,
        experts=size_of(down, 0),
        top_k=size_of(experts.indices, 1),
        width=size_of(down, 1),
        hidden_size=size_of(down, 2),
    )
    most = layer.experts // (GATHER_TRAFFIC * layer.top_k)
    if form == "dense" or (form == "auto" and most < 1):
        return [_dense(emit, layer)]
    if form == "gather":
        return [_gather(emit, layer)]
    return [_gather_or_dense(emit, layer, most)]


def mark_experts(value: ir.Value) -> None:
    """Say that a weight has one row per expert, so that tasks can share what is common."""
    match = _LAYER.search(str(value.name))
    if match is not None:
        value.metadata_props[EXPERT_AXIS_KEY] = "0"
        value.metadata_props[LAYER_KEY] = match.group(1)


@dataclass(frozen=True, kw_only=True)
class _Layer:
    hidden: ir.Value
    indices: ir.Value
    gates: ir.Value
    gate_up: ir.Value
    down: ir.Value
    gate_up_bias: ir.Value | None
    down_bias: ir.Value | None
    activation: Activation
    experts: int
    top_k: int
    width: int
    hidden_size: int

    @property
    def parts(self) -> int:
        """Halves of the first product."""
        return 2 if self.activation.gated else 1


def _dense(emit: Emitter, layer: _Layer) -> ir.Value:
    experts, width, hidden_size = layer.experts, layer.width, layer.hidden_size
    ids = emit.integers(*range(experts))
    chosen = emit.call("Equal", emit.call("Unsqueeze", layer.indices, emit.integers(-1)), ids)
    spread = where(emit, chosen, emit.call("Unsqueeze", layer.gates, emit.integers(-1)), 0.0)
    gates = emit.narrow(emit.call("ReduceSum", spread, emit.integers(1), keepdims=0))
    spread_gates = emit.call("Unsqueeze", gates, emit.integers(2, 3))
    rows = emit.call("Reshape", layer.gate_up, emit.integers(-1, hidden_size))
    projected = emit.call("Gemm", layer.hidden, rows, transB=1)
    projected = emit.call("Reshape", projected, emit.integers(-1, experts, layer.parts, width))
    if layer.gate_up_bias is not None:
        bias = emit.call(
            "Reshape", layer.gate_up_bias, emit.integers(1, experts, layer.parts, width)
        )
        projected = emit.call("Add", projected, bias)
    activated = activate(emit, layer.activation, projected, spread_gates, half=1)
    activated = emit.call("Reshape", activated, emit.integers(-1, experts * width))
    rows = emit.call("Reshape", layer.down, emit.integers(-1, hidden_size))
    output = emit.call("MatMul", activated, rows)
    if layer.down_bias is not None:
        output = emit.call("Add", output, emit.call("MatMul", gates, layer.down_bias))
    return output


def _gather(emit: Emitter, layer: _Layer) -> ir.Value:
    units = layer.top_k * layer.width
    # An unused slot has gate 0; its id may be the sentinel E, which is out of range.
    last = emit.integer(layer.experts - 1)
    ids = emit.call("Min", layer.indices, last)
    gate_up = emit.call("Gather", layer.gate_up, ids, axis=0)
    down = emit.call("Gather", layer.down, ids, axis=0)
    column = emit.call("Unsqueeze", layer.hidden, emit.integers(1, 3))
    narrow = emit.narrow(layer.gates)
    gates = emit.call("Unsqueeze", narrow, emit.integers(2, 3))
    projected = emit.call("MatMul", gate_up, column)
    if layer.gate_up_bias is not None:
        bias = emit.call("Gather", layer.gate_up_bias, ids, axis=0)
        projected = emit.call("Add", projected, emit.call("Unsqueeze", bias, emit.integers(3)))
    activated = activate(emit, layer.activation, projected, gates, half=layer.width)
    activated = emit.call("Reshape", activated, emit.integers(-1, 1, units))
    down = emit.call("Reshape", down, emit.integers(-1, units, layer.hidden_size))
    output = emit.call("Squeeze", emit.call("MatMul", activated, down), emit.integers(1))
    if layer.down_bias is not None:
        biases = emit.call("Gather", layer.down_bias, ids, axis=0)
        weighed = emit.call("Mul", biases, emit.call("Unsqueeze", narrow, emit.integers(2)))
        total = emit.call("ReduceSum", weighed, emit.integers(1), keepdims=0)
        output = emit.call("Add", output, total)
    return output


def _gather_or_dense(emit: Emitter, layer: _Layer, most: int) -> ir.Value:
    shape = emit.call("Shape", layer.hidden, start=0, end=1)
    few = emit.call("Squeeze", emit.call("LessOrEqual", shape, emit.integers(most)))
    branches = {}
    for name, lower in (("then", _gather), ("else", _dense)):
        inner = emit.branch(name)
        output = lower(inner, layer)
        branches[f"{name}_branch"] = ir.Graph(
            [], [output], nodes=inner.nodes, name=f"{emit.prefix}/{name}"
        )
        output.type = ir.TensorType(emit.compute)
        output.shape = ir.Shape([None, layer.hidden_size])
    return emit.call("If", few, **branches)


def activate(
    emit: Emitter,
    activation: Activation,
    projected: ir.Value,
    gates: ir.Value,
    half: int,
    axis: int = 2,
) -> ir.Value:
    """Apply an activation to hidden units, times the router's gates.

    The router's gate comes in before the product with the up half, which in float16 may
    overflow where an expert was not chosen, and infinity times zero is no number.

    Args:
        emit: Takes the nodes.
        activation: Which.
        projected: Hidden units; an axis has the gate half, then the up half.
        gates: The router's gates, broadcast to a half.
        half: Size of a half.
        axis: Which axis has the two.

    Returns:
        Hidden units without the gate half.
    """
    if not activation.gated:
        return emit.call("Mul", _unary(emit, activation, projected), gates)
    gate, up = emit.call_many("Split", 2, projected, emit.integers(half, half), axis=axis)
    if activation.limit < math.inf:
        high = emit.number(activation.limit, emit.compute)
        gate = emit.call("Min", gate, high)
        low = emit.number(-activation.limit, emit.compute)
        up = emit.call("Max", emit.call("Min", up, high), low)
    if activation.beta:
        up = emit.call("Add", up, emit.number(activation.beta, emit.compute))
    return emit.call("Mul", emit.call("Mul", _unary(emit, activation, gate), gates), up)


def _unary(emit: Emitter, activation: Activation, value: ir.Value) -> ir.Value:
    def number(content: float) -> ir.Value:
        return emit.number(content, emit.compute)

    if activation.kind == "swish":
        inner = value
        if activation.alpha != 1.0:
            inner = emit.call("Mul", value, number(activation.alpha))
        return emit.call("Mul", value, emit.call("Sigmoid", inner))
    if activation.kind == "relu":
        return emit.call("Relu", value)
    if activation.kind == "relu2":
        positive = emit.call("Relu", value)
        return emit.call("Mul", positive, positive)
    half = emit.call("Mul", value, number(0.5))
    if activation.kind == "gelu":
        error = emit.call("Erf", emit.call("Mul", value, number(math.sqrt(0.5))))
        return emit.call("Mul", half, emit.call("Add", error, number(1.0)))
    cube = emit.call("Mul", emit.call("Mul", value, value), value)
    inner = emit.call("Add", value, emit.call("Mul", cube, number(0.044715)))
    bend = emit.call("Tanh", emit.call("Mul", inner, number(math.sqrt(2 / math.pi))))
    return emit.call("Mul", half, emit.call("Add", bend, number(1.0)))
