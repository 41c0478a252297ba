"""Experts in ops that TensorRT builds.

TensorRT builds neither com.microsoft.MoE nor scatter-add nor NonZero, and its own MoE layer
exists on data-centre Blackwell and Jetson Thor only. That leaves these ways (E experts, T
tokens of which each uses c at most; see :mod:`edgemoe_exporters.lower_tensorrt_dispatch`):

- *gather*: copy the experts of each token, then multiply. A copy reads and writes and the
  product reads again, so this moves 3 T c experts.
- *grouped*: gather the tokens of each expert, and run all experts as one batched product. It
  reads E experts where they lie, and multiplies by as many rows as the busiest one has tokens.
- *dense*: all experts of a layer are one wide feed-forward network, whose hidden units are
  multiplied by the gate of their expert, or 0. It reads E experts and multiplies them by all
  tokens; no shape depends on what tokens choose.
- one node per expert: 7000 nodes for 16 experts in 30 layers. Not used.

So each layer chooses as it runs: gather while 3 T c <= E, as when generating, grouped above.
This counts weight traffic; no GPU has run it yet. Dense takes the place of grouped where no
shape may follow values.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgemoe_exporters.bundle import EXPERT_AXIS_KEY, LAYER_KEY
from edgemoe_exporters.initializers import set_weight
from edgemoe_exporters.lower_tensorrt_dispatch import run_cheapest
from edgemoe_exporters.lower_tensorrt_emit import Emitter, size_of
from edgemoe_exporters.lower_tensorrt_route import where

if TYPE_CHECKING:
    import onnx_ir as ir

    from edgemoe.models.activation import Activation
    from edgemoe_exporters.lower_tensorrt_dispatch import Places, Slots
    from edgemoe_exporters.nodes import ExpertsNode

_LAYER = re.compile(r"\.layers\.(\d+)\.")


def lower_experts(emit: Emitter, experts: ExpertsNode, slots: Slots) -> list[ir.Value]:
    """Run the chosen experts.

    Args:
        emit: Takes the nodes.
        experts: An Experts node.
        slots: What a lowered Route chose for it.

    Returns:
        Output ``[T, H]``.
    """
    gate_up, down = experts.gate_up, experts.down
    # [E, H, 2I] and [E, I, H]: products read them as they lie.
    for value, stored in ((gate_up, experts.gate_up_array()), (down, experts.down_array())):
        count, rows, columns = stored.shape
        turned = stored.map(lambda array: array.transpose(0, 2, 1), (count, columns, rows))
        set_weight(value, turned)
    bias = experts.gate_up_bias_array()
    if bias is not None and experts.gate_up_bias is not None:
        set_weight(experts.gate_up_bias, bias)
    for marked in (gate_up, down, experts.gate_up_bias, experts.down_bias):
        if marked is not None:
            mark_experts(marked)
    layer = Layer(
        hidden=experts.hidden,
        gate_up=gate_up,
        down=down,
        gate_up_bias=experts.gate_up_bias,
        down_bias=experts.down_bias,
        activation=experts.activation,
        experts=size_of(down, 0),
        width=size_of(down, 1),
        hidden_size=size_of(down, 2),
    )
    return [run_cheapest(emit, layer, slots)]


def mark_experts(value: ir.Value) -> None:
    """Say that a weight has one row per expert, so that tasks can share what is common."""
    match = _LAYER.search(str(value.name))
    if match is not None:
        value.metadata_props[EXPERT_AXIS_KEY] = "0"
        value.metadata_props[LAYER_KEY] = match.group(1)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """The experts of one layer, and the ways to run them.

    Attributes:
        hidden: What experts get, float ``[T, H]``.
        gate_up: First products, float ``[E, H, 2I]``; ``[E, H, I]`` without a gate.
        down: Second products, float ``[E, I, H]``.
        gate_up_bias: float ``[E, 2I]``, or None.
        down_bias: float ``[E, H]``, or None.
        activation: What is between the two products.
        experts: E.
        width: I.
        hidden_size: H.
    """

    hidden: ir.Value
    gate_up: ir.Value
    down: ir.Value
    gate_up_bias: ir.Value | None
    down_bias: ir.Value | None
    activation: Activation
    experts: int
    width: int
    hidden_size: int

    def grouped(self, emit: Emitter, places: Places) -> ir.Value:
        """Run all experts on the tokens that have a place with them."""
        weights = emit.call("Unsqueeze", places.gates, emit.integers(2))
        units = self._first_product(emit, places.rows, weights)
        outputs = emit.call("MatMul", units, self.down)
        if self.down_bias is not None:
            bias = emit.call("Unsqueeze", self.down_bias, emit.integers(1))
            outputs = emit.call("Add", outputs, emit.call("Mul", bias, weights))
        return places.sum_up(emit, outputs)

    def dense(self, emit: Emitter, slots: Slots) -> ir.Value:
        """Run all experts on all tokens."""
        gates = gates_by_expert(emit, slots, self.experts)
        weights = emit.call(
            "Unsqueeze", emit.call("Transpose", gates, perm=[1, 0]), emit.integers(2)
        )
        rows = emit.call("Unsqueeze", self.hidden, emit.integers(0))
        units = self._first_product(emit, rows, weights)
        # The units of all experts in one row: the product over them sums experts up.
        units = emit.call("Transpose", units, perm=[1, 0, 2])
        units = emit.call("Reshape", units, emit.integers(-1, self.experts * self.width))
        down = emit.call("Reshape", self.down, emit.integers(-1, self.hidden_size))
        output = emit.call("MatMul", units, down)
        if self.down_bias is not None:
            output = emit.call("Add", output, emit.call("MatMul", gates, self.down_bias))
        return output

    def gather(self, emit: Emitter, slots: Slots) -> ir.Value:
        """Copy the expert of every slot."""

        def take(value: ir.Value) -> ir.Value:
            return emit.call("Gather", value, slots.indices, axis=0)

        narrow = emit.narrow(slots.gates)
        weights = emit.call("Unsqueeze", narrow, emit.integers(2, 3))
        row = emit.call("Unsqueeze", self.hidden, emit.integers(1, 2))
        units = emit.call("MatMul", row, take(self.gate_up))
        if self.gate_up_bias is not None:
            bias = emit.call("Unsqueeze", take(self.gate_up_bias), emit.integers(2))
            units = emit.call("Add", units, bias)
        units = activate(emit, self.activation, units, weights, half=self.width, axis=3)
        units = emit.call("Reshape", units, emit.integers(0, 1, -1))
        down = emit.call("Reshape", take(self.down), emit.integers(0, -1, self.hidden_size))
        output = emit.call("Squeeze", emit.call("MatMul", units, down), emit.integers(1))
        if self.down_bias is not None:
            weighed = emit.call(
                "Mul", take(self.down_bias), emit.call("Unsqueeze", narrow, emit.integers(2))
            )
            total = emit.call("ReduceSum", weighed, emit.integers(1), keepdims=0)
            output = emit.call("Add", output, total)
        return output

    def _first_product(self, emit: Emitter, rows: ir.Value, weights: ir.Value) -> ir.Value:
        """Take rows ``[E or 1, n, H]`` to units ``[E, n, I]``, times weights ``[E, n, 1]``."""
        units = emit.call("MatMul", rows, self.gate_up)
        if self.gate_up_bias is not None:
            bias = emit.call("Unsqueeze", self.gate_up_bias, emit.integers(1))
            units = emit.call("Add", units, bias)
        return activate(emit, self.activation, units, weights, half=self.width)


def gates_by_expert(emit: Emitter, slots: Slots, experts: int) -> ir.Value:
    """Spread gates out over all experts, 0 for those that a token does not use.

    Args:
        emit: Takes the nodes.
        slots: Which experts tokens use.
        experts: E.

    Returns:
        In the type of activations, ``[T, E]``.
    """
    ids, last = emit.integers(*range(experts)), emit.integers(-1)
    chosen = emit.call("Equal", emit.call("Unsqueeze", slots.indices, last), ids)
    spread = where(emit, chosen, emit.call("Unsqueeze", slots.gates, last), 0.0)
    return emit.narrow(emit.call("ReduceSum", spread, emit.integers(1), keepdims=0))


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
