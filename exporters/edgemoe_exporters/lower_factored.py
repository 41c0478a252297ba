"""Factored experts in basic ops, for both flavours: no fused op knows them.

A factored expert is four thin products. As with whole experts (see
:mod:`edgemoe_exporters.lower_tensorrt_moe`), a graph either runs all experts of a layer for all
tokens, as batched products, or copies those of each token first: the former while
E <= 3 k T, the latter beyond, each where it moves less.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import torch

from edgemoe.models.experts import ExpertsLayout
from edgemoe_exporters.initializers import set_weight, weight_of
from edgemoe_exporters.lower_tensorrt_emit import Emitter, size_of
from edgemoe_exporters.lower_tensorrt_moe import GATHER_TRAFFIC, activate, mark_experts
from edgemoe_exporters.lower_tensorrt_route import where
from edgemoe_exporters.nodes import activation_of, present

if TYPE_CHECKING:
    from edgemoe.models.activation import Activation


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """One layer; factors are [E, inputs, outputs], but for ``up_in`` [E, R, H]."""

    hidden: ir.Value
    indices: ir.Value
    gates: ir.Value
    up_in: ir.Value
    up_out: ir.Value
    down_in: ir.Value
    down_out: ir.Value
    up_bias: ir.Value | None
    down_bias: ir.Value | None
    activation: Activation

    @property
    def experts(self) -> int:
        return size_of(self.up_in, 0)

    @property
    def width(self) -> int:
        return size_of(self.down_in, 1)

    @property
    def hidden_size(self) -> int:
        return size_of(self.up_in, 2)


def lower_factored_experts(emit: Emitter, node: ir.Node) -> list[ir.Value]:
    """Run the chosen experts.

    Args:
        emit: Takes the nodes.
        node: A FactoredExperts node; its weights are float32 ``[T, k]``, 0 where a slot is not
            used.

    Returns:
        Output ``[T, H]``.
    """
    hidden, indices, gates, up_in, up_out, down_in, down_out, *biases = node.inputs
    up_bias, down_bias = (*biases, None, None)[:2]
    concatenated = bool(node.attributes["is_concatenated"].as_int())
    activation = activation_of(node)
    layout = ExpertsLayout(has_gate=activation.gated, is_concatenated=concatenated)
    factors = [present(value) for value in (up_in, up_out, down_in, down_out)]
    _turn(factors[1], layout)
    for value in factors[2:]:
        set_weight(value, weight_of(value).transpose(0, 2, 1))
    if up_bias is not None:
        bias = torch.from_numpy(np.ascontiguousarray(weight_of(up_bias)))
        name = f"{layout.gate_up_name}_bias"
        set_weight(up_bias, layout.to_canonical(name, bias).numpy())
    for marked in (*factors, up_bias, down_bias):
        if marked is not None:
            mark_experts(marked)
    layer = _Layer(
        hidden=present(hidden),
        indices=present(indices),
        gates=present(gates),
        up_in=factors[0],
        up_out=factors[1],
        down_in=factors[2],
        down_out=factors[3],
        up_bias=up_bias,
        down_bias=down_bias,
        activation=activation,
    )
    most = layer.experts // (GATHER_TRAFFIC * size_of(layer.indices, 1))
    if most < 1:
        return [_dense(emit, layer)]
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
    return [emit.call("If", few, **branches)]


def _turn(up_out: ir.Value, layout: ExpertsLayout) -> None:
    """Put gate rows before up rows, and make it [E, R, 2I]."""
    array = torch.from_numpy(np.ascontiguousarray(weight_of(up_out)))
    turned = layout.to_canonical(layout.gate_up_name, array).transpose(1, 2)
    set_weight(up_out, turned.contiguous().numpy())


def _dense(emit: Emitter, layer: _Layer) -> ir.Value:
    ids = emit.integers(*range(layer.experts))
    chosen = emit.call("Equal", emit.call("Unsqueeze", layer.indices, emit.integers(-1)), ids)
    spread = where(emit, chosen, emit.call("Unsqueeze", layer.gates, emit.integers(-1)), 0.0)
    gates = emit.narrow(emit.call("ReduceSum", spread, emit.integers(1), keepdims=0))
    by_expert = emit.call(
        "Unsqueeze", emit.call("Transpose", gates, perm=[1, 0]), emit.integers(2)
    )
    rank = size_of(layer.up_in, 1)
    rows = emit.call("Reshape", layer.up_in, emit.integers(-1, layer.hidden_size))
    thin = emit.call("Gemm", layer.hidden, rows, transB=1)
    thin = emit.call("Reshape", thin, emit.integers(-1, layer.experts, rank))
    thin = emit.call("Transpose", thin, perm=[1, 0, 2])
    units = emit.call("MatMul", thin, layer.up_out)
    if layer.up_bias is not None:
        units = emit.call("Add", units, emit.call("Unsqueeze", layer.up_bias, emit.integers(1)))
    activated = activate(emit, layer.activation, units, by_expert, half=layer.width)
    thin = emit.call("MatMul", activated, layer.down_in)
    thin = emit.call("Transpose", thin, perm=[1, 0, 2])
    flat = layer.experts * size_of(layer.down_in, 2)
    thin = emit.call("Reshape", thin, emit.integers(-1, flat))
    rows = emit.call("Reshape", layer.down_out, emit.integers(-1, layer.hidden_size))
    output = emit.call("MatMul", thin, rows)
    if layer.down_bias is not None:
        output = emit.call("Add", output, emit.call("MatMul", gates, layer.down_bias))
    return output


def _gather(emit: Emitter, layer: _Layer) -> ir.Value:
    # An unused slot has gate 0; its id may be the sentinel E, which is out of range.
    ids = emit.call("Min", layer.indices, emit.integer(layer.experts - 1))

    def take(value: ir.Value) -> ir.Value:
        return emit.call("Gather", value, ids, axis=0)

    narrow = emit.narrow(layer.gates)
    gates = emit.call("Unsqueeze", narrow, emit.integers(2, 3))
    column = emit.call("Unsqueeze", layer.hidden, emit.integers(1, 3))
    thin = emit.call("MatMul", take(layer.up_in), column)
    row = emit.call("Transpose", thin, perm=[0, 1, 3, 2])
    units = emit.call("MatMul", row, take(layer.up_out))
    if layer.up_bias is not None:
        bias = emit.call("Unsqueeze", take(layer.up_bias), emit.integers(2))
        units = emit.call("Add", units, bias)
    activated = activate(emit, layer.activation, units, gates, half=layer.width, axis=3)
    thin = emit.call("MatMul", activated, take(layer.down_in))
    outputs = emit.call("MatMul", thin, take(layer.down_out))
    outputs = emit.call("Squeeze", outputs, emit.integers(2))
    if layer.down_bias is not None:
        weighed = emit.call(
            "Mul", take(layer.down_bias), emit.call("Unsqueeze", narrow, emit.integers(2))
        )
        outputs = emit.call("Add", outputs, weighed)
    return emit.call("ReduceSum", outputs, emit.integers(1), keepdims=0)
