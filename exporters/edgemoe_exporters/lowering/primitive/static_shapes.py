"""Experts in ops without data-dependent shapes: all of a layer, or all slots of each token.

Gate and up rows of an expert are stored as checkpoints stack them, `[2I, H]`, so that those of
all experts are one wide feed-forward network.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgemoe_exporters.lowering.primitive.activation import activate
from edgemoe_exporters.lowering.primitive.dispatch import gates_by_expert

if TYPE_CHECKING:
    import onnx_ir as ir

    from edgemoe.models.activation import Activation
    from edgemoe_exporters.graph.builder import Emitter
    from edgemoe_exporters.lowering.primitive.dispatch import Slots


@dataclass(frozen=True, kw_only=True)
class Stacks:
    """The experts of one layer.

    Attributes:
        hidden: Input of the experts, float `[T, H]`.
        gate_up: First products, float `[E, 2I, H]` or transposed; I instead of 2I without a
            gate.
        down: Second products, float `[E, I, H]`.
        gate_up_bias: float `[E, 2I]`, or None.
        down_bias: float `[E, H]`, or None.
        activation: The activation between the two products.
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

    def add_biases(self, emit: Emitter, output: ir.Value, slots: Slots) -> ir.Value:
        """Add the second biases of each slot, times its gate, to `[T, H]`."""
        if self.down_bias is None:
            return output
        biases = emit.call("Gather", self.down_bias, slots.indices, axis=0)
        gates = emit.call("Unsqueeze", emit.narrow(slots.gates), emit.integers(2))
        total = emit.call(
            "ReduceSum", emit.call("Mul", biases, gates), emit.integers(1), keepdims=0
        )
        return emit.call("Add", output, total)


@dataclass(frozen=True, kw_only=True)
class StaticLayer(Stacks):
    """Two ways to run them; `gate_up` is `[E, 2I, H]`."""

    def dense(self, emit: Emitter, slots: Slots) -> ir.Value:
        """Run all experts on all tokens."""
        experts, width, hidden_size = self.experts, self.width, self.hidden_size
        parts = 2 if self.activation.gated else 1
        gates = gates_by_expert(emit, slots, experts)
        rows = emit.call("Reshape", self.gate_up, emit.integers(-1, hidden_size))
        units = emit.call("Gemm", self.hidden, rows, transB=1)
        units = emit.call("Reshape", units, emit.integers(-1, experts, parts, width))
        if self.gate_up_bias is not None:
            shape = emit.integers(1, experts, parts, width)
            units = emit.call("Add", units, emit.call("Reshape", self.gate_up_bias, shape))
        weights = emit.call("Unsqueeze", gates, emit.integers(2, 3))
        units = activate(emit, self.activation, units, weights, half=1)
        units = emit.call("Reshape", units, emit.integers(-1, experts * width))
        rows = emit.call("Reshape", self.down, emit.integers(-1, hidden_size))
        output = emit.call("MatMul", units, rows)
        if self.down_bias is not None:
            output = emit.call("Add", output, emit.call("MatMul", gates, self.down_bias))
        return output

    def gather(self, emit: Emitter, slots: Slots) -> ir.Value:
        """Copy the expert of every slot."""

        def take(value: ir.Value) -> ir.Value:
            return emit.call("Gather", value, slots.indices, axis=0)

        units_of_token = slots.top_k * self.width
        column = emit.call("Unsqueeze", self.hidden, emit.integers(1, 3))
        weights = emit.call("Unsqueeze", emit.narrow(slots.gates), emit.integers(2, 3))
        units = emit.call("MatMul", take(self.gate_up), column)
        if self.gate_up_bias is not None:
            bias = emit.call("Unsqueeze", take(self.gate_up_bias), emit.integers(3))
            units = emit.call("Add", units, bias)
        units = activate(emit, self.activation, units, weights, half=self.width)
        units = emit.call("Reshape", units, emit.integers(-1, 1, units_of_token))
        shape = emit.integers(-1, units_of_token, self.hidden_size)
        down = emit.call("Reshape", take(self.down), shape)
        output = emit.call("Squeeze", emit.call("MatMul", units, down), emit.integers(1))
        return self.add_biases(emit, output, slots)
