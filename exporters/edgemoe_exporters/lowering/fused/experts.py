"""The experts of one layer as onnxruntime's MoE or QMoE, given their choice."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgemoe.errors import ExportError
from edgemoe_exporters.graph.editor import (
    Attribute,
    Editor,
    producer_of,
    required,
    sole_consumer,
)
from edgemoe_exporters.graph.lazy_weights import LazyWeight
from edgemoe_exporters.graph.metadata import MICROSOFT
from edgemoe_exporters.lowering.quantize_once import quantize_later

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    import onnx_ir as ir

    from edgemoe_exporters.graph.nodes import ExpertsNode, RouteNode
    from edgemoe_exporters.lowering.fused.routing import Choice
    from edgemoe_exporters.precision import Precision


@dataclass
class Shared:
    """Values that all layers read.

    Attributes:
        caps: Most experts per token, one value for each layer.
        rows: Rows to scatter into, by their width and what fills them.
    """

    caps: tuple[ir.Value, ...]
    rows: dict[tuple[int, float], ir.Value]


def _rows(editor: Editor, shared: Shared, experts: int, fill: float) -> ir.Value:
    """Return float32 `[T, E]` of one number, computed once per run."""
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
    shared: Shared,
    fill: float,
) -> ir.Value:
    rows = _rows(editor, shared, choice.experts + choice.idle, fill)
    inputs = [rows, choice.indices, values]
    (spread,) = editor.add(before, "ScatterElements", inputs, {"axis": 1})
    if not choice.idle:
        return spread
    ends = [
        editor.constant(f"ints_{number}", np.array([number], dtype=np.int64))
        for number in (0, choice.experts, 1)
    ]
    return editor.add(before, "Slice", [spread, *ends])[0]


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


@dataclass(frozen=True)
class FusedLayer:
    """One layer that becomes a fused op.

    Attributes:
        editor: The graph.
        node: Its Experts node.
        experts: The same, read.
        route: Its Route node, read.
        choice: What that became.
        shared: Values that all layers read.
        precision: Gives the type of activations and weights.
    """

    editor: Editor
    node: ir.Node
    experts: ExpertsNode
    route: RouteNode
    choice: Choice
    shared: Shared
    precision: Precision

    def scaled(self, weights: LazyWeight) -> LazyWeight:
        """Multiply each expert's part `[E, ...]` by the factor of its gates."""
        scaling = self.route.rule.scaling_factor
        scale = self.route.expert_scale
        per_expert = None if scale is None else LazyWeight.of(scale)

        def multiply(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            factor = np.full(len(array), scaling, dtype=np.float32)
            if per_expert is not None:
                factor *= per_expert.compute().astype(np.float32)
            if (factor == 1).all():
                return array
            product = array * factor.reshape(-1, *[1] * (array.ndim - 1))
            return product.astype(np.float32, copy=False)

        return weights.map(multiply)

    @property
    def padding(self) -> int:
        """Intermediate channels of zeros added to fill the blocks of the second product."""
        width = self.experts.down_array().shape[-1]
        return -width % self.precision.block if self.precision.bits else 0

    def fc1(self) -> LazyWeight:
        """Return gate and up rows in turn, `[E, 2I, H]`."""
        return _pad(self.experts.gate_up_array().map(_interleave), 1, 2 * self.padding)

    def fc2(self) -> LazyWeight:
        """Return down rows times the factors of gates, `[E, H, I]`."""
        return _pad(self.scaled(self.experts.down_array()), 2, self.padding)

    def biases(self) -> list[ir.Value | None]:
        """Return the biases of both products, as the fused ops take them."""
        first, second = self.experts.gate_up_bias_array(), self.experts.down_bias_array()
        if first is None or second is None:
            return [None, None]
        assert self.experts.gate_up_bias is not None
        assert self.experts.down_bias is not None
        return [
            _derived(
                self.editor,
                self.experts.gate_up_bias,
                "interleaved",
                _pad(
                    first.map(lambda array: _interleave(array[..., None])[..., 0]),
                    1,
                    2 * self.padding,
                ),
                self.precision,
            ),
            _derived(
                self.editor,
                self.experts.down_bias,
                "scaled",
                self.scaled(second),
                self.precision,
            ),
        ]

    @property
    def attributes(self) -> dict[str, Attribute]:
        """Attributes that MoE and QMoE share."""
        activation = self.experts.activation
        found: dict[str, Attribute] = {
            "k": self.route.top_k,
            "activation_type": "swiglu",
            "swiglu_fusion": 1,
            "activation_alpha": activation.alpha,
            "activation_beta": activation.beta,
            "normalize_routing_weights": 1,
        }
        if activation.limit < math.inf:
            found["swiglu_limit"] = activation.limit
        return found


def lower_to_moe(layer: FusedLayer) -> None:
    """Replace Experts by MoE: its softmax over the gates' logarithms gives the gates back.

    Gates that do not sum to one come back divided by their sum, so it is multiplied in.

    Args:
        layer: The layer; its graph is changed.
    """
    editor, node, choice, precision = layer.editor, layer.node, layer.choice, layer.precision
    total: ir.Value | None = None
    values = choice.logits
    if values is None:
        weights = choice.weights(editor, node)
        (values,) = editor.add(node, "Log", [weights])
        if not choice.sums_to_one or choice.shared is not None:
            axis = editor.constant("ints_1", np.array([1], dtype=np.int64))
            (total,) = editor.add(node, "ReduceSum", [weights, axis], {"keepdims": 1})
    logits = _scatter(editor, node, choice, values, layer.shared, -np.inf)
    if choice.idle:
        # A token may have no expert: its softmax is then of anything, times a sum of 0.
        zero = editor.constant("zero", np.array(0, dtype=np.float32))
        (is_empty,) = editor.add(node, "Equal", [required(total), zero])
        (logits,) = editor.add(node, "Where", [is_empty, zero, logits])
    logits = precision.cast(editor, node, logits)
    fc1 = _derived(editor, layer.experts.gate_up, "interleaved", layer.fc1(), precision)
    fc2 = _derived(editor, layer.experts.down, "scaled", layer.fc2(), precision)
    bias1, bias2 = layer.biases()

    def add_op(hidden: ir.Value) -> ir.Value:
        inputs = [hidden, logits, fc1, bias1, fc2, bias2]
        if bias2 is None:
            inputs.pop()
        return editor.add(node, "MoE", inputs, layer.attributes, domain=MICROSOFT)[0]

    if total is None:
        _replace_unflattened(editor, node, add_op)
        return
    total = precision.cast(editor, node, total)
    (output,) = editor.add(node, "Mul", [add_op(required(node.inputs[0])), total])
    editor.replace(node.outputs[0], output)


def lower_to_qmoe(layer: FusedLayer) -> None:
    """Replace Experts by QMoE, which takes gates as they are: one tensor chooses and weighs.

    Args:
        layer: The layer; its graph is changed.

    Raises:
        ExportError: Rows are no multiple of the precision's blocks.
    """
    editor, node, choice, precision = layer.editor, layer.node, layer.choice, layer.precision
    weights: ir.Value | None = None
    if choice.logits is None:
        values = choice.weights(editor, node)
        rows = weights = _scatter(editor, node, choice, values, layer.shared, 0.0)
    else:
        rows = _scatter(editor, node, choice, choice.logits, layer.shared, -np.inf)
    fc1 = _blocks(editor, layer.experts.gate_up, layer.fc1(), precision)
    fc2 = _blocks(editor, layer.experts.down, layer.fc2(), precision)
    bias1, bias2 = layer.biases()
    inputs = [rows, fc1[0], fc1[1], bias1, fc2[0], fc2[1], bias2, None, None, None]
    inputs += [fc1[2], fc2[2], None, weights]
    attributes = {
        **layer.attributes,
        "expert_weight_bits": precision.bits,
        "block_size": precision.block,
        "accuracy_level": precision.accuracy_level,
        # It would divide even the gates that it is given by their sum.
        "normalize_routing_weights": int(weights is None),
    }

    def add_op(hidden: ir.Value) -> ir.Value:
        trimmed = [hidden, *inputs]
        while trimmed[-1] is None:
            trimmed.pop()
        return editor.add(node, "QMoE", trimmed, attributes, domain=MICROSOFT)[0]

    _replace_unflattened(editor, node, add_op)


def _interleave(gate_up: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Alternate gate and up rows: `[E, 2I, H]` with gate first to gate, up, gate, up."""
    experts, rows, hidden = gate_up.shape
    pairs = gate_up.reshape(experts, 2, rows // 2, hidden).swapaxes(1, 2)
    return np.ascontiguousarray(pairs).reshape(experts, rows, hidden)


def _pad(weights: LazyWeight, axis: int, zeros: int) -> LazyWeight:
    """Add zeros to the end of an axis."""
    if not zeros:
        return weights
    shape = list(weights.shape)
    shape[axis] += zeros
    missing = [(0, zeros if n == axis else 0) for n in range(len(shape))]
    return weights.map(lambda array: np.pad(array, missing), shape)


def _derived(
    editor: Editor,
    source: ir.Value,
    suffix: str,
    content: LazyWeight,
    precision: Precision,
) -> ir.Value:
    name = f"{source.name}.{suffix}"
    tensor = content.tensor(name, precision.dtype)
    return editor.initializer(name, tensor, dict(source.metadata_props))


def _blocks(
    editor: Editor, source: ir.Value, content: LazyWeight, precision: Precision
) -> tuple[ir.Value, ir.Value, ir.Value | None]:
    if content.shape[-1] % precision.block:
        raise ExportError(
            f"{source.name} must have rows divisible by {precision.block} to be quantised, got "
            f"{content.shape[-1]} columns. Export with precision fp32 or fp16."
        )
    parts = quantize_later(
        editor.latest, content, precision.bits, precision.block, precision.symmetric
    )
    values = []
    for part, array in parts.items():
        name = f"{source.name}.{'quantised' if part == 'packed' else part}"
        values.append(editor.initializer(name, array.tensor(name), dict(source.metadata_props)))
    return values[0], values[1], values[2] if len(values) == 3 else None
