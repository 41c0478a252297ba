"""Convolutions and linear attention in ops that TensorRT 10.3 parses; what both flavours share.

Linear attention is a Scan over the new tokens: one step while generating, as many as the prompt
has tokens before that. Its state is float32 in every precision.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from edgemoe_exporters.graph.builder import FLOAT32, Emitter, size_of

if TYPE_CHECKING:
    from collections.abc import Sequence

_END = np.iinfo(np.int64).max


def lower_new_mask(emit: Emitter, node: ir.Node) -> list[ir.Value]:
    """Slice the columns of the new tokens.

    Args:
        emit: Takes the nodes.
        node: A NewMask node.

    Returns:
        The mask `[B, S]` in the type of activations.
    """
    attention_mask, states = node.inputs
    total = emit.call("Shape", attention_mask, start=1, end=2)
    new = emit.call("Shape", states, start=1, end=2)
    first = emit.call("Sub", total, new)
    mask = emit.call("Slice", attention_mask, first, total, emit.integers(1))
    return [emit.call("Cast", mask, to=emit.compute)]


def repeat_heads(emit: Emitter, states: ir.Value, heads: int) -> ir.Value:
    """Repeat each group's states for its heads.

    Args:
        emit: Takes the nodes.
        states: `[B, S, M, D]`.
        heads: N, a multiple of M.

    Returns:
        `[B, S, N, D]`.
    """
    groups, size = size_of(states, 2), size_of(states, 3)
    if groups == heads:
        return states
    each = emit.integers(1, 1, 1, heads // groups, 1)
    several = emit.call("Expand", emit.call("Unsqueeze", states, emit.integers(3)), each)
    return emit.call("Reshape", several, emit.integers(0, 0, heads, size))


def lower_softplus(emit: Emitter, node: ir.Node) -> list[ir.Value]:
    """Compute log(1 + exp x) in float32, which neither overflows nor is 0 for -10.

    Args:
        emit: Takes the nodes.
        node: A Softplus node.

    Returns:
        The result, in the type of activations.
    """
    states = node.inputs[0]
    assert states is not None
    return [emit.narrow(emit.call("Softplus", emit.wide(states)))]


def lower_causal_conv(emit: Emitter, node: ir.Node) -> list[ir.Value]:
    """Convolve cached and new positions.

    Args:
        emit: Takes the nodes.
        node: A CausalConv node.

    Returns:
        Output `[B, C, S]` and the float32 state `[B, C, W - 1]`.
    """
    states, past, weight, *bias = node.inputs
    assert past is not None
    assert weight is not None
    kept, channels = size_of(past, 2), size_of(past, 1)
    joined = emit.call("Concat", emit.narrow(past), states, axis=2)
    kernel = emit.call("Unsqueeze", weight, emit.integers(1))
    inputs = [joined, kernel, *(value for value in bias if value is not None)]
    output = emit.call(
        "Conv", *inputs, group=channels, kernel_shape=[kept + 1], pads=[0, 0], strides=[1]
    )
    if node.attributes["activation"].as_string() == "silu":
        output = emit.call("Mul", output, emit.call("Sigmoid", output))
    axis = emit.integers(2)
    present = emit.call("Slice", joined, emit.integers(-kept), emit.integers(_END), axis)
    return [output, emit.wide(present)]


def lower_join_positions(emit: Emitter, node: ir.Node) -> list[ir.Value]:
    """Join cached and new positions.

    Args:
        emit: Takes the nodes.
        node: A JoinPositions node.

    Returns:
        The positions `[B, C, W + S]` and the float32 state `[B, C, W]`.
    """
    states, past = node.inputs
    assert past is not None
    joined = emit.call("Concat", emit.narrow(past), states, axis=2)
    first, last = emit.integers(-size_of(past, 2)), emit.integers(_END)
    present = emit.call("Slice", joined, first, last, emit.integers(2))
    return [joined, emit.wide(present)]


def lower_linear_attention(emit: Emitter, node: ir.Node) -> list[ir.Value]:
    """Run the recurrence token by token.

    Args:
        emit: Takes the nodes.
        node: A LinearAttention node.

    Returns:
        Output `[B, S, N, V]` and the float32 state `[B, N, D, V]`.
    """
    query, key, value, decay, beta, past = node.inputs
    assert query is not None
    assert key is not None
    assert value is not None
    assert decay is not None
    heads, size, width = size_of(value, 2), size_of(query, 3), size_of(value, 3)
    query, key = repeat_heads(emit, query, heads), repeat_heads(emit, key, heads)
    fades = size_of(decay, 3)
    row, column = emit.integers(3), emit.integers(4)
    scale = emit.number(node.attributes["scale"].as_float())
    scaled = emit.call("Mul", emit.wide(query), scale)
    steps: dict[str, tuple[ir.Value, tuple[int, int, int]]] = {
        "query": (emit.call("Unsqueeze", scaled, row), (heads, 1, size)),
        "column": (emit.call("Unsqueeze", emit.wide(key), column), (heads, size, 1)),
        "value": (emit.call("Unsqueeze", emit.wide(value), row), (heads, 1, width)),
    }
    fading = emit.call("Unsqueeze", emit.call("Exp", emit.wide(decay)), column)
    steps["fading"] = fading, (heads, fades, 1)
    if beta is not None:
        both = emit.integers(3, 4)
        steps["beta"] = emit.call("Unsqueeze", emit.wide(beta), both), (heads, 1, 1)
        steps["row"] = emit.call("Unsqueeze", emit.wide(key), row), (heads, 1, size)
    body = _body(emit, {name: shape for name, (_, shape) in steps.items()}, width)
    inputs: Sequence[ir.Value | None] = [past, *(value for value, _ in steps.values())]
    present, output = emit.call_many(
        "Scan",
        2,
        *inputs,
        body=body,
        num_scan_inputs=len(steps),
        scan_input_axes=[1] * len(steps),
        scan_output_axes=[1],
    )
    flat = emit.call("Squeeze", output, row)
    return [emit.narrow(flat), present]


def _body(emit: Emitter, steps: dict[str, tuple[int, int, int]], width: int) -> ir.Graph:
    """Return the body of the Scan, which runs once per token."""
    inner = emit.branch("token")
    heads, _, size = steps["query"]
    given = {"state": (heads, size, width), **steps}
    value_of = {
        name: ir.Value(
            name=f"{inner.prefix}/{name}",
            shape=ir.Shape(["batch", *shape]),
            type=ir.TensorType(FLOAT32),
        )
        for name, shape in given.items()
    }
    state = inner.call("Mul", value_of["state"], value_of["fading"])
    content = value_of["value"]
    if "beta" in steps:
        known = inner.call("MatMul", value_of["row"], state)
        content = inner.call("Mul", inner.call("Sub", content, known), value_of["beta"])
    state = inner.call("Add", state, inner.call("Mul", value_of["column"], content))
    output = inner.call("MatMul", value_of["query"], state)
    for found, shape in ((state, given["state"]), (output, (heads, 1, width))):
        found.shape = ir.Shape(["batch", *shape])
        found.type = ir.TensorType(FLOAT32)
    return ir.Graph(
        list(value_of.values()), [state, output], nodes=inner.nodes, name=inner.prefix
    )
