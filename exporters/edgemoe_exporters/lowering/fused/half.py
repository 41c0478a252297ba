"""Float16 weights, activations and cache, around a router that stays in float32."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from edgemoe_exporters.graph.initializers import narrow_attributes, set_weight, state_values
from edgemoe_exporters.graph.lazy_weights import LazyWeight
from edgemoe_exporters.graph.metadata import DOMAIN

if TYPE_CHECKING:
    from edgemoe_exporters.graph.editor import Editor
    from edgemoe_exporters.precision import Precision

_FLOAT, _HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16

# Inputs that choose experts or are angles: neither tolerates rounding.
_EXACT = {"Route", "RotaryEmbedding", "Angles"}


def convert_to_half(editor: Editor, precision: Precision) -> None:
    """Store weights and cache in float16; logits stay float32.

    Args:
        editor: The traced graph, before any other step.
        precision: Nothing happens unless its activations are float16.
    """
    if precision.dtype != _HALF:
        return
    for value in editor.graph.initializers.values():
        readers = {node.op_type for node in value.consumers() if node.domain == DOMAIN}
        if value.dtype == _FLOAT and not readers & _EXACT:
            set_weight(value, LazyWeight.of(value), _HALF)
    kept = state_values(editor.graph)
    for node in editor.graph:
        narrow_attributes(node, _HALF)
        for output in node.outputs:
            if output.type is not None and output.dtype == _FLOAT and output not in kept:
                output.type = ir.TensorType(_HALF)
    for value in editor.graph.inputs:
        if value.dtype == _FLOAT and value not in kept:
            value.type = ir.TensorType(_HALF)
    _widen_logits(editor)


def _widen_logits(editor: Editor) -> None:
    logits = editor.graph.outputs[0]
    name, narrow = logits.name, logits
    narrow.name = f"{name}_half"
    cast = ir.node("Cast", [narrow], {"to": int(_FLOAT)})
    editor.graph.append(cast)
    output = cast.outputs[0]
    output.name, output.shape, output.type = name, narrow.shape, ir.TensorType(_FLOAT)
    editor.graph.outputs[0] = output
