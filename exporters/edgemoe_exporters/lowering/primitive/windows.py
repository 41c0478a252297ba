"""Windows of positions that become one entry each, in primitive ops and float32."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgemoe_exporters.graph.builder import Emitter, size_of

if TYPE_CHECKING:
    import onnx_ir as ir

# As good as minus infinity for a softmax beside gates of a model.
_LOW = -1e30


def lower_pool_windows(emit: Emitter, node: ir.Node) -> list[ir.Value]:
    """Mix the positions of each full window.

    Args:
        emit: Takes the nodes.
        node: A PoolWindows node.

    Returns:
        Entries `[B, (P + S) // W, D]`, in the type of activations.
    """
    states, bias = node.inputs
    assert states is not None
    assert bias is not None
    width, channels = size_of(bias, 0), size_of(bias, 1)
    total = emit.call("Shape", states, start=1, end=2)
    count = emit.call("Div", total, emit.integers(width))
    used = emit.call("Mul", count, emit.integers(width))
    whole = emit.call("Slice", emit.wide(states), emit.integers(0), used, emit.integers(1))
    whole = emit.call("Reshape", whole, emit.integers(0, -1, width, 2 * channels))

    def part(value: ir.Value, first: int, last: int) -> ir.Value:
        axis = emit.integers(3)
        return emit.call("Slice", value, emit.integers(first), emit.integers(last), axis)

    content = part(whole, 0, channels)
    gates = emit.call("Add", part(whole, channels, 2 * channels), emit.wide(bias))
    if node.attributes["overlaps"].as_int():
        half = channels // 2

        def join(value: ir.Value, fill: float) -> ir.Value:
            """Put the first halves of the window before beside the second halves."""
            pads = emit.integers(0, 1, 0, 0, 0, 0, 0, 0)
            number = emit.number(fill)
            moved = emit.call("Pad", part(value, 0, half), pads, number, mode="constant")
            moved = emit.call("Slice", moved, emit.integers(0), count, emit.integers(1))
            return emit.call("Concat", moved, part(value, half, channels), axis=2)

        content, gates = join(content, 0.0), join(gates, _LOW)
    weights = emit.call("Softmax", gates, axis=2)
    mixed = emit.call("Mul", content, weights)
    return [emit.narrow(emit.call("ReduceSum", mixed, emit.integers(2), keepdims=0))]
