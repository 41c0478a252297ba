"""Convolutions and linear attention as onnxruntime's CausalConvWithState and LinearAttention.

Both compute in float32, which is all that their kernels for a CPU know, and what their states
are in every precision.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgemoe_exporters.graph.builder import Emitter
from edgemoe_exporters.graph.editor import (
    Editor,
    producer_of,
    required,
    size_of,
)
from edgemoe_exporters.graph.metadata import DOMAIN, MICROSOFT
from edgemoe_exporters.lowering.primitive.recurrence import (
    lower_join_positions,
    lower_new_mask,
    lower_softplus,
    repeat_heads,
)
from edgemoe_exporters.lowering.primitive.routing import lower_shared_gates
from edgemoe_exporters.lowering.primitive.windows import lower_pool_windows

if TYPE_CHECKING:
    import onnx_ir as ir

    from edgemoe_exporters.precision import Precision


_DECOMPOSED = {
    "NewMask": lower_new_mask,
    "Softplus": lower_softplus,
    "JoinPositions": lower_join_positions,
    "SharedGates": lower_shared_gates,
    "PoolWindows": lower_pool_windows,
}


def lower_recurrence(editor: Editor, precision: Precision) -> None:
    """Replace what keeps a state, and what is the same in both flavours.

    Args:
        editor: The graph.
        precision: Gives the type of activations.
    """
    for op_type, decompose in _DECOMPOSED.items():
        for node in editor.nodes(op_type, DOMAIN):
            emit = Emitter(editor.graph, precision.dtype, str(node.name))
            outputs = decompose(emit, node)
            editor.graph.insert_before(node, emit.nodes)
            for old, new in zip(node.outputs, outputs, strict=True):
                editor.replace(old, new)
    for node in editor.nodes("CausalConv", DOMAIN):
        _lower_conv(editor, node, precision)
    for node in editor.nodes("LinearAttention", DOMAIN):
        _lower_attention(editor, node, precision)


def _lower_conv(editor: Editor, node: ir.Node, precision: Precision) -> None:
    states, past, weight = (required(value) for value in node.inputs[:3])
    bias = node.inputs[3] if len(node.inputs) > 3 else None
    squeeze = producer_of(weight, "Squeeze")
    if squeeze is not None:
        # [C, 1, W], as the checkpoint has it.
        kernel = required(squeeze.inputs[0])
    else:
        middle = editor.constant("ints_1", np.array([1], dtype=np.int64))
        (kernel,) = editor.add(node, "Unsqueeze", [weight, middle])
    inputs = [states, kernel, bias, past]
    wide = [
        value if value is None or value is past else precision.to_float32(editor, node, value)
        for value in inputs
    ]
    output, present = editor.add(
        node,
        "CausalConvWithState",
        wide,
        {"activation": node.attributes["activation"].as_string(), "ndim": 1},
        domain=MICROSOFT,
        outputs=2,
    )
    editor.replace(node.outputs[0], precision.cast(editor, node, output))
    editor.replace(node.outputs[1], present)


def _lower_attention(editor: Editor, node: ir.Node, precision: Precision) -> None:
    query, key, value, decay = (required(part) for part in node.inputs[:4])
    beta, past = node.inputs[4], required(node.inputs[5])
    heads, width = size_of(value, 2), size_of(value, 3)
    merge = editor.constant("merge_heads", np.array([0, 0, -1], dtype=np.int64))

    def flat(part: ir.Value) -> ir.Value:
        (merged,) = editor.add(node, "Reshape", [part, merge])
        return precision.to_float32(editor, node, merged)

    emit = Emitter(editor.graph, precision.dtype, str(node.name))
    query, key = repeat_heads(emit, query, heads), repeat_heads(emit, key, heads)
    editor.graph.insert_before(node, emit.nodes)
    inputs = [flat(query), flat(key), flat(value), past, flat(decay)]
    if beta is not None:
        inputs.append(precision.to_float32(editor, node, beta))
    output, present = editor.add(
        node,
        "LinearAttention",
        inputs,
        {
            "q_num_heads": heads,
            "kv_num_heads": heads,
            "update_rule": "gated" if beta is None else "gated_delta",
            "scale": node.attributes["scale"].as_float(),
        },
        domain=MICROSOFT,
        outputs=2,
    )
    shape = np.array([0, 0, heads, width], dtype=np.int64)
    split = editor.constant(f"split_heads_{heads}_{width}", shape)
    (apart,) = editor.add(node, "Reshape", [precision.cast(editor, node, output), split])
    editor.replace(node.outputs[0], apart)
    editor.replace(node.outputs[1], present)
