"""Attention and rotary embedding as onnxruntime's GroupQueryAttention and RotaryEmbedding.

Cache slot j belongs to column j of the attention mask, so every row of a batch counts
`total` slots, and padding, wherever it is, is a bias on the scores. The rotation is its own
op: GroupQueryAttention's own rotation ignores `position_ids` when it reads a prompt
(onnxruntime 1.31), which breaks decoding after a padded prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from edgemoe.errors import ExportError
from edgemoe_exporters.graph.builder import Emitter
from edgemoe_exporters.graph.editor import (
    Editor,
    array_of,
    producer_of,
    required,
    size_of,
    sole_consumer,
)
from edgemoe_exporters.graph.metadata import DOMAIN, MICROSOFT
from edgemoe_exporters.lowering.primitive.attention import Shared
from edgemoe_exporters.lowering.primitive.table import SHARING

if TYPE_CHECKING:
    from edgemoe_exporters.precision import Precision

# Finite, so that a padding row that sees nothing does not become NaN; in float16 too.
_HIDDEN = -30000.0


@dataclass(frozen=True)
class _Slots:
    """Values of the cache that all layers read, computed once per run."""

    past: ir.Value
    total: ir.Value
    bias: ir.Value


@dataclass(frozen=True)
class _Rotation:
    """The angles of all layers, computed once per run."""

    cos: ir.Value
    sin: ir.Value
    positions: ir.Value
    inv_freq: ir.Value
    scaling: float


def lower_attention(editor: Editor, precision: Precision) -> None:
    """Replace every op of attention, and the RotaryEmbedding before it.

    Args:
        editor: The graph.
        precision: Gives the type of activations.

    Raises:
        ExportError: Two layers rotate by different frequencies.
    """
    nodes = list(editor.nodes("Attention", DOMAIN))
    names = ("AttendAll", "SelectKeys", "SelectBlocks", "Angles")
    apart = [node for name in names for node in editor.nodes(name, DOMAIN)]
    some_join = any(node.op_type == "AttendAll" for node in apart)
    _decompose(editor, apart, precision)
    # One cache has one form: either all layers share buffers, or none does.
    if some_join or any(_sizes_differ(node) for node in nodes):
        rotations = list(editor.nodes("RotaryEmbedding", DOMAIN))
        _decompose(editor, [*rotations, *nodes], precision)
        return
    slots: _Slots | None = None
    rotation: _Rotation | None = None
    for node in nodes:
        slots = slots or _share_slots(editor, node, precision)
        first = producer_of(node.inputs[0], "RotaryEmbedding", DOMAIN)
        if rotation is None and first is not None:
            rotation = _share_rotation(editor, first, precision)
        query = _rotated(editor, node, 0, rotation)
        key = _rotated(editor, node, 1, rotation)
        value = _tokens_first(editor, node, required(node.inputs[2]))
        heads = _heads(required(node.inputs[0]))
        window = node.attributes["sliding_window"].as_int()
        sinks = node.inputs[6] if len(node.inputs) > 6 else None
        inputs = [query, key, value, node.inputs[3], node.inputs[4], slots.past, slots.total]
        inputs += [None, None, None, slots.bias]
        if sinks is not None:
            inputs.append(sinks)
        outputs = editor.add(
            node,
            "GroupQueryAttention",
            inputs,
            {
                "num_heads": heads,
                "kv_num_heads": _heads(required(node.inputs[1])),
                "scale": node.attributes["scale"].as_float(),
                "local_window_size": window or -1,
                "do_rotary": 0,
            },
            domain=MICROSOFT,
            outputs=3,
        )
        _flatten_heads(editor, node, outputs[0])
        editor.replace(node.outputs[1], outputs[1])
        editor.replace(node.outputs[2], outputs[2])
    editor.tidy()
    # Some families do something else between rotating and attending.
    _decompose(editor, list(editor.nodes("RotaryEmbedding", DOMAIN)), precision)


def _sizes_differ(node: ir.Node) -> bool:
    """Return whether values differ from keys in head size, for which there is no fused op."""
    return size_of(required(node.inputs[1]), 3) != size_of(required(node.inputs[2]), 3)


def _decompose(editor: Editor, nodes: list[ir.Node], precision: Precision) -> None:
    """Decompose nodes into primitive ops."""
    order = {id(node): position for position, node in enumerate(editor.graph)}
    shared = Shared()
    for node in sorted(nodes, key=lambda node: order[id(node)]):
        emit = Emitter(editor.graph, precision.dtype, str(node.name or node.op_type))
        outputs = SHARING[node.op_type](emit, node, shared)
        editor.graph.insert_before(node, emit.nodes)
        for old, new in zip(node.outputs, outputs, strict=True):
            new.shape = old.shape
            new.type = new.type or ir.TensorType(precision.dtype)
            editor.replace(old, new)


def _share_slots(editor: Editor, node: ir.Node, precision: Precision) -> _Slots:
    """Compute the number of slots and the bias before the first layer."""
    first = editor.graph[0]
    mask = required(node.inputs[5])
    tokens = next(value for value in editor.graph.inputs if value.name == "input_ids")
    int32, float32 = int(ir.DataType.INT32), int(ir.DataType.FLOAT)

    def ints(*numbers: int) -> ir.Value:
        return _ints(editor, *numbers)

    (shape,) = editor.add(first, "Shape", [mask])
    (batch,) = editor.add(first, "Gather", [shape, ints(0)])
    zero_axis = editor.constant("axis_1", np.array(1, dtype=np.int64))
    (columns,) = editor.add(first, "Gather", [shape, zero_axis])
    (total,) = editor.add(first, "Cast", [columns], {"to": int32})
    one = editor.constant("one_int32", np.array(1, dtype=np.int32))
    (last,) = editor.add(first, "Sub", [total, one])
    (past_slots,) = editor.add(first, "Expand", [last, batch])

    (rows,) = editor.add(first, "Shape", [tokens], {"start": 1, "end": 2})
    (mask_float,) = editor.add(first, "Cast", [mask], {"to": float32})
    unit = editor.constant("one", np.array(1, dtype=np.float32))
    hidden = editor.constant("hidden", np.array(_HIDDEN, dtype=np.float32))
    (padding,) = editor.add(first, "Sub", [unit, mask_float])
    (columns_bias,) = editor.add(first, "Mul", [padding, hidden])
    (bias,) = editor.add(first, "Unsqueeze", [columns_bias, ints(1, 2)])
    (bias_shape,) = editor.add(first, "Concat", [ints(1, 1), rows, ints(1)], {"axis": 0})
    (bias,) = editor.add(first, "Expand", [bias, bias_shape])
    return _Slots(past_slots, total, precision.cast(editor, first, bias))


def _share_rotation(editor: Editor, rotary: ir.Node, precision: Precision) -> _Rotation:
    """Compute the angles before the first layer."""
    first = editor.graph[0]
    positions = required(rotary.inputs[1])
    float32 = int(ir.DataType.FLOAT)
    scaling = rotary.attributes["scaling"].as_float()
    (flat,) = editor.add(first, "Reshape", [positions, _ints(editor, -1, 1)])
    (flat,) = editor.add(first, "Cast", [flat], {"to": float32})
    (angles,) = editor.add(first, "Mul", [flat, required(rotary.inputs[2])])
    (cos,) = editor.add(first, "Cos", [angles])
    (sin,) = editor.add(first, "Sin", [angles])
    if scaling != 1.0:
        factor = editor.constant("rotary_scaling", np.array(scaling, dtype=np.float32))
        (cos,) = editor.add(first, "Mul", [cos, factor])
        (sin,) = editor.add(first, "Mul", [sin, factor])
    # The op looks angles up by position: here the table has one row per token of this run.
    (ids_shape,) = editor.add(first, "Shape", [positions])
    (size,) = editor.add(first, "Size", [positions])
    zero = editor.constant("zero_int64", np.array(0, dtype=np.int64))
    step = editor.constant("one_int64", np.array(1, dtype=np.int64))
    (lookup,) = editor.add(first, "Range", [zero, size, step])
    (lookup,) = editor.add(first, "Reshape", [lookup, ids_shape])
    cos, sin = (precision.cast(editor, first, value) for value in (cos, sin))
    return _Rotation(cos, sin, lookup, required(rotary.inputs[2]), scaling)


def _ints(editor: Editor, *numbers: int) -> ir.Value:
    name = "ints_" + "_".join(str(number).replace("-", "n") for number in numbers)
    return editor.constant(name, np.array(numbers, dtype=np.int64))


def _rotated(
    editor: Editor, node: ir.Node, position: int, shared: _Rotation | None
) -> ir.Value:
    source = required(node.inputs[position])
    rotary = producer_of(source, "RotaryEmbedding", DOMAIN)
    if rotary is None or shared is None:
        return _tokens_first(editor, node, source)
    states = required(rotary.inputs[0])
    inv_freq = required(rotary.inputs[2])
    same = inv_freq is shared.inv_freq or np.array_equal(
        array_of(inv_freq), array_of(shared.inv_freq)
    )
    if not same or rotary.attributes["scaling"].as_float() != shared.scaling:
        raise ExportError(
            f"all layers must rotate by the same frequencies, got others in {node.name}. "
            "Choose a TensorRT target."
        )
    (output,) = editor.add(
        node,
        "RotaryEmbedding",
        [_tokens_first(editor, node, states), shared.positions, shared.cos, shared.sin],
        {
            "num_heads": _heads(states),
            "rotary_embedding_dim": 2 * size_of(inv_freq, 0),
            "interleaved": 0,
        },
        domain=MICROSOFT,
    )
    return output


def _heads(states: ir.Value) -> int:
    return size_of(states, 1)


def _tokens_first(editor: Editor, before: ir.Node, states: ir.Value) -> ir.Value:
    """Reshape `[B, heads, S, D]` to `[B, S, heads * D]`, undoing what the model did."""
    transpose = producer_of(states, "Transpose")
    if transpose is not None and transpose.attributes["perm"].as_ints() == (0, 2, 1, 3):
        split_heads = required(transpose.inputs[0])
    else:
        (split_heads,) = editor.add(before, "Transpose", [states], {"perm": [0, 2, 1, 3]})
    reshape = producer_of(split_heads, "Reshape")
    if reshape is not None:
        source = required(reshape.inputs[0])
        if source.shape is not None and len(source.shape) == 3:
            return source
    shape = editor.constant("merge_heads", np.array([0, 0, -1], dtype=np.int64))
    (merged,) = editor.add(before, "Reshape", [split_heads, shape])
    return merged


def _flatten_heads(editor: Editor, node: ir.Node, output: ir.Value) -> None:
    """Pass `[B, S, heads * D]` to the reader that flattened `[B, S, heads, D]` itself."""
    old = node.outputs[0]
    reshape = sole_consumer(old, "Reshape")
    if reshape is not None:
        flat = reshape.outputs[0]
        if flat.shape is not None and len(flat.shape) == 3:
            editor.replace(flat, output)
            return
    shape = np.array([0, 0, size_of(old, 2), size_of(old, 3)], dtype=np.int64)
    name = f"split_heads_{shape[2]}_{shape[3]}"
    (split,) = editor.add(node, "Reshape", [output, editor.constant(name, shape)])
    editor.replace(old, split)
