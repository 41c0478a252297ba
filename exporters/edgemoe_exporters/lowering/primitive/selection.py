"""Select keys or blocks of keys in ops that TensorRT 10.3 parses; for both flavours.

TopK takes a constant number there, so columns that lose are appended where there may be fewer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgemoe_exporters.lowering.primitive.attention import HIDDEN, Shared, shared_mask

if TYPE_CHECKING:
    import onnx_ir as ir

    from edgemoe_exporters.graph.builder import Emitter

_LOWEST, _HIGHEST = -3e38, 3e38


def lower_select_keys(emit: Emitter, node: ir.Node, shared: Shared) -> list[ir.Value]:
    """Hide keys whose score is below that of the last one chosen.

    Args:
        emit: Takes the nodes.
        node: A SelectKeys node.
        shared: Masks made so far.

    Returns:
        The mask that is added to the scores of attention, `[B, S, P + S]`.
    """
    scores, attention_mask = node.inputs
    assert scores is not None
    assert attention_mask is not None
    one = emit.integers(1)
    rows = emit.call("Unsqueeze", emit.wide(scores), one)
    rows = _masked(emit, shared, rows, attention_mask)
    chosen = _best(emit, rows, node.attributes["count"].as_int())
    added = emit.call("Where", chosen, emit.number(0.0), emit.number(HIDDEN))
    return [emit.narrow(emit.call("Squeeze", added, one))]


def lower_select_blocks(emit: Emitter, node: ir.Node, shared: Shared) -> list[ir.Value]:
    """Hide blocks whose highest score is below that of the last one chosen.

    Args:
        emit: Takes the nodes.
        node: A SelectBlocks node.
        shared: Masks made so far.

    Returns:
        The mask that is added to the scores of attention, `[B, M, S, P + S]`.
    """
    scores, attention_mask = node.inputs
    assert scores is not None
    assert attention_mask is not None
    size, local = (node.attributes[name].as_int() for name in ("block_size", "local"))
    rows = _masked(emit, shared, emit.wide(scores), attention_mask)
    columns, one, axis = emit.integers(size), emit.integers(1), emit.integers(3)
    total = emit.call("Shape", rows, start=3, end=4)
    # Up to a whole number of blocks.
    rounded = emit.call("Div", emit.call("Add", total, emit.integers(size - 1)), columns)
    whole = emit.call("Mul", rounded, columns)
    filled = emit.call("Concat", rows, _filler(emit, rows, size), axis=3)
    filled = emit.call("Slice", filled, emit.integers(0), whole, axis)
    blocks = emit.call("Reshape", filled, emit.integers(0, 0, 0, -1, size))
    blocks = emit.call("ReduceMax", blocks, emit.integers(4), keepdims=0)
    new, end, count = (
        emit.call("Squeeze", vector, emit.integers(0))
        for vector in (emit.call("Shape", rows, start=2, end=3), total, rounded)
    )
    slots = emit.call("Range", emit.call("Sub", end, new), end, emit.integer(1))
    own = emit.call("Unsqueeze", emit.call("Div", slots, columns), one)
    numbers = emit.call("Range", emit.integer(0), count, emit.integer(1))
    behind = emit.call("Sub", own, numbers)
    near = emit.call(
        "And",
        emit.call("GreaterOrEqual", behind, emit.integers(0)),
        emit.call("Less", behind, emit.integers(local)),
    )
    blocks = emit.call("Where", near, emit.number(_HIGHEST), blocks)
    chosen = _best(emit, blocks, node.attributes["count"].as_int())
    added = emit.call("Where", chosen, emit.number(0.0), emit.number(HIDDEN))
    each = emit.call("Unsqueeze", added, emit.integers(4))
    each = emit.call("Expand", each, emit.integers(1, 1, 1, 1, size))
    each = emit.call("Reshape", each, emit.integers(0, 0, 0, -1))
    return [emit.narrow(emit.call("Slice", each, emit.integers(0), total, axis, one))]


def _masked(
    emit: Emitter, shared: Shared, rows: ir.Value, attention_mask: ir.Value
) -> ir.Value:
    """Set scores of invisible slots to the lowest; attention's own mask is not that low."""
    mask = shared_mask(emit, shared, rows, attention_mask)
    hidden = emit.call("Less", mask, emit.number(0.0))
    return emit.call("Where", hidden, emit.number(_LOWEST), rows)


def _best(emit: Emitter, rows: ir.Value, count: int) -> ir.Value:
    """Return which columns of `[B, M, S, columns]` are among the best and not hidden."""
    enough = emit.call("Concat", rows, _filler(emit, rows, count), axis=3)
    best, _ = emit.call_many(
        "TopK", 2, enough, emit.integers(count), axis=-1, largest=1, sorted=1
    )
    last = emit.integers(count - 1)
    least = emit.call("Slice", best, last, emit.integers(count), emit.integers(3))
    high = emit.call("GreaterOrEqual", rows, least)
    return emit.call("And", high, emit.call("Greater", rows, emit.number(_LOWEST)))


def _filler(emit: Emitter, rows: ir.Value, columns: int) -> ir.Value:
    leading = emit.call("Shape", rows, start=0, end=3)
    shape = emit.call("Concat", leading, emit.integers(columns), axis=0)
    return emit.call("Expand", emit.number(_LOWEST), shape)
