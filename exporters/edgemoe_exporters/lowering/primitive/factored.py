"""Factored experts in primitive ops, for both flavours: no fused op knows them.

A factored expert is four thin products. As with whole experts (see
`lowering.primitive.moe`), a graph either copies the experts that each
token uses, or dispatches tokens to experts and runs all experts as batched products: the
former while it moves less memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from edgemoe.models.experts import ExpertsLayout
from edgemoe_exporters.graph.builder import Emitter, size_of
from edgemoe_exporters.graph.editor import required
from edgemoe_exporters.graph.initializers import convert_once
from edgemoe_exporters.graph.lazy_weights import LazyWeight
from edgemoe_exporters.graph.nodes import activation_of
from edgemoe_exporters.lowering.primitive.activation import activate
from edgemoe_exporters.lowering.primitive.dispatch import (
    gates_by_expert,
    run_dynamic,
    run_static,
)

if TYPE_CHECKING:
    import onnx_ir as ir

    from edgemoe.models.activation import Activation
    from edgemoe_exporters.lowering.primitive.dispatch import Dispatch, Slots


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """One layer, and the ways to run it; each takes the slots that are in use.

    Factors are [E, inputs, outputs], but for `up_in` [E, R, H].
    """

    hidden: ir.Value
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

    def grouped(self, emit: Emitter, dispatch: Dispatch) -> ir.Value:
        thin = emit.call(
            "MatMul", self.up_in, emit.call("Transpose", dispatch.rows, perm=[0, 2, 1])
        )
        units = emit.call("MatMul", emit.call("Transpose", thin, perm=[0, 2, 1]), self.up_out)
        weights = emit.call("Unsqueeze", dispatch.gates, emit.integers(2))
        activated = self._activate(emit, units, weights)
        thin = emit.call("MatMul", activated, self.down_in)
        outputs = emit.call("MatMul", thin, self.down_out)
        if self.down_bias is not None:
            bias = emit.call("Unsqueeze", self.down_bias, emit.integers(1))
            outputs = emit.call("Add", outputs, emit.call("Mul", bias, weights))
        return dispatch.combine(emit, outputs)

    def dense(self, emit: Emitter, slots: Slots) -> ir.Value:
        gates = gates_by_expert(emit, slots, self.experts)
        by_expert = emit.call(
            "Unsqueeze", emit.call("Transpose", gates, perm=[1, 0]), emit.integers(2)
        )
        rank = size_of(self.up_in, 1)
        rows = emit.call("Reshape", self.up_in, emit.integers(-1, self.hidden_size))
        thin = emit.call("Gemm", self.hidden, rows, transB=1)
        thin = emit.call("Reshape", thin, emit.integers(-1, self.experts, rank))
        thin = emit.call("Transpose", thin, perm=[1, 0, 2])
        units = emit.call("MatMul", thin, self.up_out)
        activated = self._activate(emit, units, by_expert)
        thin = emit.call("MatMul", activated, self.down_in)
        thin = emit.call("Transpose", thin, perm=[1, 0, 2])
        flat = self.experts * size_of(self.down_in, 2)
        thin = emit.call("Reshape", thin, emit.integers(-1, flat))
        rows = emit.call("Reshape", self.down_out, emit.integers(-1, self.hidden_size))
        output = emit.call("MatMul", thin, rows)
        if self.down_bias is not None:
            output = emit.call("Add", output, emit.call("MatMul", gates, self.down_bias))
        return output

    def gather(self, emit: Emitter, slots: Slots) -> ir.Value:
        def take(value: ir.Value) -> ir.Value:
            return emit.call("Gather", value, slots.indices, axis=0)

        narrow = emit.narrow(slots.gates)
        gates = emit.call("Unsqueeze", narrow, emit.integers(2, 3))
        column = emit.call("Unsqueeze", self.hidden, emit.integers(1, 3))
        thin = emit.call("MatMul", take(self.up_in), column)
        row = emit.call("Transpose", thin, perm=[0, 1, 3, 2])
        units = emit.call("MatMul", row, take(self.up_out))
        if self.up_bias is not None:
            bias = emit.call("Unsqueeze", take(self.up_bias), emit.integers(2))
            units = emit.call("Add", units, bias)
        activated = activate(emit, self.activation, units, gates, half=self.width, axis=3)
        thin = emit.call("MatMul", activated, take(self.down_in))
        outputs = emit.call("MatMul", thin, take(self.down_out))
        outputs = emit.call("Squeeze", outputs, emit.integers(2))
        if self.down_bias is not None:
            weighed = emit.call(
                "Mul", take(self.down_bias), emit.call("Unsqueeze", narrow, emit.integers(2))
            )
            outputs = emit.call("Add", outputs, weighed)
        return emit.call("ReduceSum", outputs, emit.integers(1), keepdims=0)

    def _activate(self, emit: Emitter, units: ir.Value, weights: ir.Value) -> ir.Value:
        """Apply bias and activation to units `[E, rows, 2I]`, times weights."""
        if self.up_bias is not None:
            bias = emit.call("Unsqueeze", self.up_bias, emit.integers(1))
            units = emit.call("Add", units, bias)
        return activate(emit, self.activation, units, weights, half=self.width)


def lower_factored_experts(emit: Emitter, node: ir.Node, slots: Slots) -> list[ir.Value]:
    """Run the chosen experts.

    Args:
        emit: Takes the nodes.
        node: A FactoredExperts node.
        slots: The experts that the lowered Route chose for each token.

    Returns:
        Output `[T, H]`.
    """
    hidden, _, _, up_in, up_out, down_in, down_out, *biases = node.inputs
    up_bias, down_bias = (*biases, None, None)[:2]
    concatenated = bool(node.attributes["is_concatenated"].as_int())
    activation = activation_of(node)
    layout = ExpertsLayout(has_gate=activation.gated, is_concatenated=concatenated)
    factors = [required(value) for value in (up_in, up_out, down_in, down_out)]
    _transpose_up_out(factors[1], layout)
    for value in factors[2:]:
        convert_once(value, partial(_transposed, value))
    if up_bias is not None:
        convert = partial(_canonical, layout, f"{layout.gate_up_name}_bias")
        stored = LazyWeight.of(up_bias)
        convert_once(up_bias, lambda: stored.map(convert))
    layer = _Layer(
        hidden=required(hidden),
        up_in=factors[0],
        up_out=factors[1],
        down_in=factors[2],
        down_out=factors[3],
        up_bias=up_bias,
        down_bias=down_bias,
        activation=activation,
    )
    run = run_static if slots.max_used is None else run_dynamic
    return [run(emit, layer, slots)]


def _transpose_up_out(up_out: ir.Value, layout: ExpertsLayout) -> None:
    """Order gate rows before up rows, and transpose to `[E, R, 2I]`."""
    stored = LazyWeight.of(up_out)
    count, rows, columns = stored.shape

    def transpose(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return _canonical(layout, layout.gate_up_name, array).transpose(0, 2, 1)

    convert_once(up_out, lambda: stored.map(transpose, (count, columns, rows)))


def _transposed(value: ir.Value) -> LazyWeight:
    stored = LazyWeight.of(value)
    count, rows, columns = stored.shape
    return stored.map(lambda array: array.transpose(0, 2, 1), (count, columns, rows))


def _canonical(
    layout: ExpertsLayout, name: str, array: np.ndarray[Any, Any]
) -> np.ndarray[Any, Any]:
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    found: np.ndarray[Any, Any] = layout.to_canonical(name, tensor).numpy()
    return found
