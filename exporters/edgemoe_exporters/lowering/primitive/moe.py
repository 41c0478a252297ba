"""Experts in ops that TensorRT builds.

TensorRT builds neither com.microsoft.MoE nor scatter-add nor NonZero, and its own MoE layer
exists on data-centre Blackwell and Jetson Thor only. That leaves these ways (E experts, T
tokens of which each uses c at most; see `lowering.primitive.dispatch`):

- *gather*: copy the experts of each token, then multiply. A copy reads and writes and the
  product reads again, so this moves 3 T c experts.
- *grouped*: dispatch tokens to experts, and run all experts as one batched product. It reads E
  experts in place, and multiplies each by as many rows as the expert capacity.
- *dense*: all experts of a layer are one wide feed-forward network, whose hidden units are
  multiplied by the gate of their expert, or 0. It reads E experts and multiplies them by all
  tokens; no shape depends on the routing.
- one node per expert: 7000 nodes for 16 experts in 30 layers. Not used.

So each layer chooses as it runs: gather while 3 T c <= E, as when generating, grouped above.
This counts weight traffic; no GPU has run it yet. Dense replaces grouped where data-dependent
shapes are not allowed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgemoe_exporters.graph.builder import Emitter, size_of
from edgemoe_exporters.graph.initializers import convert_once
from edgemoe_exporters.lowering.primitive.activation import activate
from edgemoe_exporters.lowering.primitive.dispatch import run_dynamic, run_static
from edgemoe_exporters.lowering.primitive.static_shapes import Stacks, StaticLayer

if TYPE_CHECKING:
    import onnx_ir as ir

    from edgemoe_exporters.graph.lazy_weights import LazyWeight
    from edgemoe_exporters.graph.nodes import ExpertsNode
    from edgemoe_exporters.lowering.primitive.dispatch import Dispatch, Slots


def lower_experts(emit: Emitter, experts: ExpertsNode, slots: Slots) -> list[ir.Value]:
    """Run the chosen experts.

    Args:
        emit: Takes the nodes.
        experts: An Experts node.
        slots: The experts that the lowered Route chose for each token.

    Returns:
        Output `[T, H]`.
    """
    gate_up, down = experts.gate_up, experts.down
    # Products read them in place.
    convert_once(down, lambda: _transposed(experts.down_array()))
    first = experts.gate_up_array
    convert_once(gate_up, first if slots.max_used is None else lambda: _transposed(first()))
    bias = experts.gate_up_bias_array()
    if bias is not None and experts.gate_up_bias is not None:
        canonical = bias
        convert_once(experts.gate_up_bias, lambda: canonical)
    kind = StaticLayer if slots.max_used is None else Layer
    layer = kind(
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
    if isinstance(layer, StaticLayer):
        return [run_static(emit, layer, slots)]
    return [run_dynamic(emit, layer, slots)]


def _transposed(stored: LazyWeight) -> LazyWeight:
    count, rows, columns = stored.shape
    return stored.map(lambda array: array.transpose(0, 2, 1), (count, columns, rows))


@dataclass(frozen=True, kw_only=True)
class Layer(Stacks):
    """Two ways to run experts with data-dependent shapes; `gate_up` is `[E, H, 2I]`."""

    def grouped(self, emit: Emitter, dispatch: Dispatch) -> ir.Value:
        """Run all experts on the tokens dispatched to them."""
        weights = emit.call("Unsqueeze", dispatch.gates, emit.integers(2))
        units = self._first_product(emit, dispatch.rows, weights)
        outputs = emit.call("MatMul", units, self.down)
        if self.down_bias is not None:
            bias = emit.call("Unsqueeze", self.down_bias, emit.integers(1))
            outputs = emit.call("Add", outputs, emit.call("Mul", bias, weights))
        return dispatch.combine(emit, outputs)

    def gather(self, emit: Emitter, slots: Slots) -> ir.Value:
        """Copy the expert of every slot."""

        def take(value: ir.Value) -> ir.Value:
            return emit.call("Gather", value, slots.indices, axis=0)

        weights = emit.call("Unsqueeze", emit.narrow(slots.gates), emit.integers(2, 3))
        row = emit.call("Unsqueeze", self.hidden, emit.integers(1, 2))
        units = emit.call("MatMul", row, take(self.gate_up))
        if self.gate_up_bias is not None:
            bias = emit.call("Unsqueeze", take(self.gate_up_bias), emit.integers(2))
            units = emit.call("Add", units, bias)
        units = activate(emit, self.activation, units, weights, half=self.width, axis=3)
        units = emit.call("Reshape", units, emit.integers(0, 1, -1))
        down = emit.call("Reshape", take(self.down), emit.integers(0, -1, self.hidden_size))
        output = emit.call("Squeeze", emit.call("MatMul", units, down), emit.integers(1))
        return self.add_biases(emit, output, slots)

    def _first_product(self, emit: Emitter, rows: ir.Value, weights: ir.Value) -> ir.Value:
        """Multiply rows `[E or 1, n, H]` into units `[E, n, I]`, times weights `[E, n, 1]`."""
        units = emit.call("MatMul", rows, self.gate_up)
        if self.gate_up_bias is not None:
            bias = emit.call("Unsqueeze", self.gate_up_bias, emit.integers(1))
            units = emit.call("Add", units, bias)
        return activate(emit, self.activation, units, weights, half=self.width)
