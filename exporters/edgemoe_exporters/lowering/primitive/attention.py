"""Attention, rotary embedding and RMS norm in ops that TensorRT 10.3 parses.

Newer TensorRT has an Attention op, which takes one output only (no cache), rotary and norm
ops; JetPack 6.2 has none of them. The mask and the sines, which layers have in common, are
computed once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import onnx_ir as ir

from edgemoe_exporters.graph.builder import FLOAT32, Emitter, size_of

if TYPE_CHECKING:
    from collections.abc import Sequence

# Far below any score and within float16, should a kernel hold scores in it. A row of padding
# sees nothing; it then averages instead of dividing by zero.
HIDDEN = -6e4


@dataclass
class Shared:
    """Values that several layers use, by the inputs they were computed from."""

    masks: dict[tuple[object, ...], ir.Value] = field(default_factory=dict)
    angles: dict[tuple[object, ...], tuple[ir.Value, ir.Value]] = field(default_factory=dict)


def lower_attention(emit: Emitter, node: ir.Node, shared: Shared) -> list[ir.Value]:
    """Attend, and join past and new positions.

    Args:
        emit: Takes the nodes.
        node: An Attention node.
        shared: Masks made so far.

    Returns:
        Output `[B, S, N, D]`, present keys and present values.
    """
    query, key, value, past_key, past_value, attention_mask, *sinks = node.inputs
    present_key = emit.call("Concat", past_key, key, axis=2)
    present_value = emit.call("Concat", past_value, value, axis=2)
    for present, new in ((present_key, key), (present_value, value)):
        assert new is not None
        present.shape, present.type = new.shape, new.type
    inputs = [query, present_key, present_value, attention_mask, *sinks]
    return [_attend(emit, node, inputs, shared), present_key, present_value]


def lower_attend_all(emit: Emitter, node: ir.Node, shared: Shared) -> list[ir.Value]:
    """Attend where the model has joined past and new positions.

    Args:
        emit: Takes the nodes.
        node: An AttendAll node.
        shared: Masks made so far.

    Returns:
        Output `[B, S, N, V]`.
    """
    return [_attend(emit, node, node.inputs, shared)]


def _attend(
    emit: Emitter, node: ir.Node, inputs: Sequence[ir.Value | None], shared: Shared
) -> ir.Value:
    """Attend with float32 softmax; query heads of one key head are rows of one product."""
    query, present_key, present_value, attention_mask, *rest = inputs
    sinks, selected, bias = [*rest, None, None, None][:3]
    assert query is not None
    assert present_key is not None
    assert present_value is not None
    assert attention_mask is not None
    heads, groups = size_of(query, 1), size_of(present_key, 1)
    size, value_size = size_of(query, 3), size_of(present_value, 3)
    repeats = heads // groups
    window = node.attributes["sliding_window"].as_int()
    mask = shared_mask(emit, shared, query, attention_mask, repeats, window)
    scale = emit.number(node.attributes["scale"].as_float(), emit.compute)
    scaled = emit.call("Mul", query, scale)
    rows = emit.call("Reshape", scaled, emit.integers(0, groups, -1, size))
    columns = emit.call("Transpose", present_key, perm=[0, 1, 3, 2])
    scores = emit.wide(emit.call("MatMul", rows, columns))
    scores = emit.call("Add", scores, mask)
    if selected is not None:
        chosen = emit.wide(selected)
        several = emit.call("Concat", *[chosen] * repeats, axis=2) if repeats > 1 else chosen
        scores = emit.call("Add", scores, several)
    if bias is not None:
        # The scores have a row for each token of each query head of a key head.
        shape = emit.call("Shape", scores)
        scores = emit.call("Add", scores, emit.call("Reshape", emit.wide(bias), shape))
    if sinks is not None:
        weights = _softmax_with_sinks(emit, scores, query, sinks, groups, repeats)
    else:
        weights = emit.call("Softmax", scores, axis=-1)
    mixed = emit.call("MatMul", emit.narrow(weights), present_value)
    mixed = emit.call("Reshape", mixed, emit.integers(0, heads, -1, value_size))
    return emit.call("Transpose", mixed, perm=[0, 2, 1, 3])


def _softmax_with_sinks(
    emit: Emitter,
    scores: ir.Value,
    query: ir.Value,
    sinks: ir.Value,
    groups: int,
    repeats: int,
) -> ir.Value:
    """Compute a softmax with one more, empty slot per head, or token (attention sinks)."""
    one, column = emit.integers(1), emit.wide(sinks)
    if sinks.shape is not None and len(sinks.shape) == 1:
        batch = emit.call("Shape", query, start=0, end=1)
        new = emit.call("Shape", query, start=2, end=3)
        column = emit.call("Reshape", column, emit.integers(1, groups, repeats, 1, 1))
        shape = emit.call("Concat", batch, one, one, new, one, axis=0)
        column = emit.call("Expand", column, shape)
    column = emit.call("Reshape", column, emit.integers(0, groups, -1, 1))
    weights = emit.call("Softmax", emit.call("Concat", scores, column, axis=-1), axis=-1)
    return emit.call("Slice", weights, emit.integers(0), emit.integers(-1), emit.integers(-1))


def lower_rotary(emit: Emitter, node: ir.Node, shared: Shared) -> list[ir.Value]:
    """Rotate the halves of each head; angles are float32.

    Args:
        emit: Takes the nodes.
        node: A RotaryEmbedding node.
        shared: Angles made so far.

    Returns:
        Rotated states `[B, N, S, D]`.
    """
    states, position_ids, inv_freq = node.inputs
    assert states is not None
    assert position_ids is not None
    assert inv_freq is not None
    scaling = node.attributes["scaling"].as_float()
    half = size_of(inv_freq, 0)
    rest = size_of(states, 3) - 2 * half
    angle_key = (position_ids, inv_freq, scaling)
    if angle_key not in shared.angles:
        shared.angles[angle_key] = _angles(emit, position_ids, inv_freq, scaling)
    cosine, sine = shared.angles[angle_key]
    sizes = emit.integers(half, half, rest) if rest else emit.integers(half, half)
    parts = emit.call_many("Split", 3 if rest else 2, states, sizes, axis=-1)
    first, second = parts[0], parts[1]
    rotated = [
        emit.call("Sub", emit.call("Mul", first, cosine), emit.call("Mul", second, sine)),
        emit.call("Add", emit.call("Mul", second, cosine), emit.call("Mul", first, sine)),
    ]
    return [emit.call("Concat", *rotated, *parts[2:], axis=-1)]


def lower_angles(emit: Emitter, node: ir.Node, shared: Shared) -> list[ir.Value]:
    """Compute cosines and sines in float32.

    Args:
        emit: Takes the nodes.
        node: An Angles node.
        shared: Angles made so far.

    Returns:
        Cosines and sines, in the type of activations.
    """
    position_ids, inv_freq = node.inputs
    assert position_ids is not None
    assert inv_freq is not None
    scaling, layout = (
        node.attributes["scaling"].as_float(),
        node.attributes["layout"].as_string(),
    )
    angle_key = (position_ids, inv_freq, scaling, layout)
    if angle_key not in shared.angles:
        positions = emit.call("Cast", position_ids, to=FLOAT32)
        positions = emit.call("Unsqueeze", positions, emit.integers(2))
        values = emit.call("Mul", positions, inv_freq)
        if layout == "halves":
            values = emit.call("Concat", values, values, axis=-1)
        elif layout == "pairs":
            pairs = emit.call("Unsqueeze", values, emit.integers(3))
            pairs = emit.call("Concat", pairs, pairs, axis=-1)
            values = emit.call("Reshape", pairs, emit.integers(0, 0, -1))
        shared.angles[angle_key] = _cos_and_sin(emit, values, scaling)
    return list(shared.angles[angle_key])


def lower_norm(emit: Emitter, node: ir.Node) -> list[ir.Value]:
    """Normalise in float32, with the weight in float32 too.

    Args:
        emit: Takes the nodes.
        node: An RMSNorm node; its weight is float32 already.

    Returns:
        Normalised states.
    """
    states = node.inputs[0]
    weight = node.inputs[1] if len(node.inputs) > 1 else None
    assert states is not None
    wide = emit.wide(states)
    square = emit.call("Mul", wide, wide)
    mean = emit.call("ReduceMean", square, emit.integers(-1), keepdims=1)
    epsilon = emit.number(node.attributes["epsilon"].as_float())
    root = emit.call("Sqrt", emit.call("Add", mean, epsilon))
    unit = emit.call("Div", wide, root)
    if weight is not None:
        offset = node.attributes["offset"].as_float()
        if offset:
            weight = emit.call("Add", weight, emit.number(offset))
        unit = emit.call("Mul", unit, weight)
    return [emit.narrow(unit)]


def shared_mask(
    emit: Emitter,
    shared: Shared,
    query: ir.Value,
    attention_mask: ir.Value,
    repeats: int = 1,
    window: int = 0,
) -> ir.Value:
    """Return the mask that is added to scores, that of another layer where it is the same.

    Args:
        emit: Takes the nodes.
        shared: Masks made so far.
        query: Has the new tokens along axis 2.
        attention_mask: `[B, P + S]`.
        repeats: Query heads of a key head.
        window: LatestResult slots that a token sees; 0 for all.

    Returns:
        float32 `[B, 1, repeats * S, P + S]`, 0 where a slot is visible.
    """
    mask_key = (attention_mask, repeats, window)
    if mask_key not in shared.masks:
        shared.masks[mask_key] = _mask(emit, query, attention_mask, repeats, window)
    return shared.masks[mask_key]


def _mask(
    emit: Emitter, query: ir.Value, attention_mask: ir.Value, repeats: int, window: int
) -> ir.Value:
    """Return the mask that is added to scores, float32 `[B, 1, repeats * S, P + S]`."""
    zero, one = emit.integer(0), emit.integer(1)
    axis = emit.integers(0)
    new = emit.call("Squeeze", emit.call("Shape", query, start=2, end=3), axis)
    total = emit.call("Squeeze", emit.call("Shape", attention_mask, start=1, end=2), axis)
    column = emit.call("Range", zero, total, one)
    row = emit.call("Range", emit.call("Sub", total, new), total, one)
    row = emit.call("Unsqueeze", row, emit.integers(1))
    visible = emit.call("LessOrEqual", column, row)
    if window:
        oldest = emit.call("Sub", row, emit.integers(window))
        visible = emit.call("And", visible, emit.call("Greater", column, oldest))
    real = emit.call("Cast", attention_mask, to=ir.DataType.BOOL)
    real = emit.call("Unsqueeze", real, emit.integers(1, 2))
    allowed = emit.call("And", visible, real)
    mask = emit.call("Where", allowed, emit.number(0.0), emit.number(HIDDEN))
    return mask if repeats == 1 else emit.call("Concat", *[mask] * repeats, axis=2)


def _angles(
    emit: Emitter, position_ids: ir.Value, inv_freq: ir.Value, scaling: float
) -> tuple[ir.Value, ir.Value]:
    """Return cosines and sines `[B, 1, S, R / 2]`."""
    positions = emit.call("Cast", position_ids, to=FLOAT32)
    positions = emit.call("Unsqueeze", positions, emit.integers(1, 3))
    return _cos_and_sin(emit, emit.call("Mul", positions, inv_freq), scaling)


def _cos_and_sin(emit: Emitter, angles: ir.Value, scaling: float) -> tuple[ir.Value, ir.Value]:
    pair = []
    for op in ("Cos", "Sin"):
        value = emit.call(op, angles)
        if scaling != 1.0:
            value = emit.call("Mul", value, emit.number(scaling))
        pair.append(emit.narrow(value))
    return pair[0], pair[1]
