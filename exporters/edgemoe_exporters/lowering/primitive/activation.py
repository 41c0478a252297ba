"""Activations of experts in primitive ops."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

    from edgemoe.models.activation import Activation
    from edgemoe_exporters.graph.builder import Emitter


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
        activation: The activation.
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
    up = _bounded(emit, up, activation.up_softcap)
    if activation.beta:
        up = emit.call("Add", up, emit.number(activation.beta, emit.compute))
    return emit.call("Mul", emit.call("Mul", _unary(emit, activation, gate), gates), up)


def _bounded(emit: Emitter, value: ir.Value, cap: float) -> ir.Value:
    """Return `cap * tanh(value / cap)`; the value itself where the cap is infinite."""
    if cap == math.inf:
        return value
    bent = emit.call("Tanh", emit.call("Mul", value, emit.number(1 / cap, emit.compute)))
    return emit.call("Mul", bent, emit.number(cap, emit.compute))


def _unary(emit: Emitter, activation: Activation, value: ir.Value) -> ir.Value:
    def number(content: float) -> ir.Value:
        return emit.number(content, emit.compute)

    if activation.kind == "swish":
        inner = value
        if activation.alpha != 1.0:
            inner = emit.call("Mul", value, number(activation.alpha))
        factor = _bounded(emit, value, activation.gate_softcap)
        return emit.call("Mul", factor, emit.call("Sigmoid", inner))
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
