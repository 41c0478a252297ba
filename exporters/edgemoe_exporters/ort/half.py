"""Float16 weights, activations and cache, around a router that stays in float32."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from edgemoe_exporters.ort.editor import MICROSOFT, Editor, array_of

if TYPE_CHECKING:
    from edgemoe_exporters.ort.precision import Precision

_FLOAT, _HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16

# Ops that compute in the type of activations; whatever else reads floats stays in float32.
_HALF_OPS = {
    ("", "MatMul"),
    ("", "Add"),
    ("", "Mul"),
    ("", "Sigmoid"),
    ("", "SimplifiedLayerNormalization"),
    (MICROSOFT, "SkipSimplifiedLayerNormalization"),
    (MICROSOFT, "FusedMatMul"),
    (MICROSOFT, "MoE"),
    (MICROSOFT, "GroupQueryAttention"),
    (MICROSOFT, "RotaryEmbedding"),
    (MICROSOFT, "QuickGelu"),
}


def convert_to_half(editor: Editor, precision: Precision) -> None:
    """Store weights and cache in float16; logits stay float32.

    Args:
        editor: The graph.
        precision: Nothing happens unless its activations are float16.
    """
    if precision.dtype != _HALF:
        return
    gathered = [node for node in editor.nodes("Gather") if _reads_weights(node)]
    converted: set[int] = set()
    for node in [*gathered, *editor.graph]:
        if node not in gathered and (node.domain, node.op_type) not in _HALF_OPS:
            continue
        for value in node.inputs:
            if value is not None and value.is_initializer() and id(value) not in converted:
                converted.add(id(value))
                if value.dtype == _FLOAT:
                    name = value.name
                    value.const_value = ir.tensor(array_of(value).astype(np.float16), name=name)
                    value.dtype = _HALF
        for output in node.outputs:
            if output.type is not None and output.dtype == _FLOAT:
                output.dtype = _HALF
    for value in [*editor.graph.inputs, *editor.graph.outputs]:
        if value.dtype == _FLOAT:
            value.dtype = _HALF
    _widen_logits(editor)


def _reads_weights(node: ir.Node) -> bool:
    weight = node.inputs[0]
    return weight is not None and weight.is_initializer() and weight.dtype == _FLOAT


def _widen_logits(editor: Editor) -> None:
    logits = editor.graph.outputs[0]
    name, narrow = logits.name, logits
    narrow.name = f"{name}_half"
    cast = ir.node("Cast", [narrow], {"to": int(_FLOAT)})
    editor.graph.append(cast)
    output = cast.outputs[0]
    output.name, output.shape, output.dtype = name, narrow.shape, _FLOAT
    editor.graph.outputs[0] = output
