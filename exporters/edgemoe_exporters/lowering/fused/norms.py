"""Normalisation and activation as onnxruntime's fused ops."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from edgemoe_exporters.graph.editor import (
    Editor,
    producer_of,
    required,
    size_of,
)
from edgemoe_exporters.graph.lazy_weights import LazyWeight
from edgemoe_exporters.graph.metadata import DOMAIN, MICROSOFT

if TYPE_CHECKING:
    from edgemoe_exporters.precision import Precision


def lower_norms(editor: Editor, precision: Precision) -> None:
    """Replace every RMSNorm, together with the residual addition before it.

    Args:
        editor: The graph.
        precision: fp32 gets the steps one by one, all others the fused op.
    """
    for node in editor.nodes("RMSNorm", DOMAIN):
        if precision.is_exact:
            _decompose(editor, node)
            continue
        states, weight = required(node.inputs[0]), _scale(editor, node)
        epsilon = node.attributes["epsilon"].as_float()
        addition = producer_of(states, "Add")
        if addition is not None and _can_fuse(addition):
            outputs = editor.add(
                node,
                "SkipSimplifiedLayerNormalization",
                [addition.inputs[0], addition.inputs[1], weight],
                {"epsilon": epsilon},
                domain=MICROSOFT,
                outputs=4,
            )
            outputs[1].name = outputs[2].name = ""
            editor.replace(node.outputs[0], outputs[0])
            editor.replace(states, outputs[3])
            continue
        (output,) = editor.add(
            node,
            "SimplifiedLayerNormalization",
            [states, weight],
            {"epsilon": epsilon, "axis": -1, "stash_type": 1},
        )
        editor.replace(node.outputs[0], output)


def _scale(editor: Editor, node: ir.Node) -> ir.Value:
    """Return the scale of a norm: its weight, plus the offset that the family leaves out."""
    states = required(node.inputs[0])
    weight = node.inputs[1] if len(node.inputs) > 1 else None
    offset = node.attributes["offset"].as_float()
    if weight is None:
        width = size_of(states, -1)
        kind = states.dtype or ir.DataType.FLOAT
        ones = np.ones(width, dtype=kind.numpy())
        return editor.constant(f"ones_{width}_{kind.name.lower()}", ones)
    if not offset:
        return weight
    name = f"{weight.name}.plus_{offset:g}"
    if name not in editor.graph.initializers:
        whole = LazyWeight.of(weight).map(lambda array: array + array.dtype.type(offset))
        editor.initializer(name, whole.tensor(name))
    return editor.graph.initializers[name]


def _decompose(editor: Editor, node: ir.Node) -> None:
    """Normalise step by step.

    The fused op adds squares one after the other, which loses a bit or two against the
    pairwise sum here and in torch: over 30 layers, a third of the difference to eager.
    """
    states, weight = required(node.inputs[0]), _scale(editor, node)
    epsilon = node.attributes["epsilon"].as_float()
    last = editor.constant("ints_n1", np.array([-1], dtype=np.int64))
    tiny = editor.constant(f"epsilon_{epsilon:g}", np.array(epsilon, dtype=np.float32))
    (square,) = editor.add(node, "Mul", [states, states])
    (mean,) = editor.add(node, "ReduceMean", [square, last], {"keepdims": 1})
    (shifted,) = editor.add(node, "Add", [mean, tiny])
    (root,) = editor.add(node, "Sqrt", [shifted])
    (unit,) = editor.add(node, "Div", [states, root])
    (output,) = editor.add(node, "Mul", [unit, weight])
    editor.replace(node.outputs[0], output)


def _can_fuse(addition: ir.Node) -> bool:
    """Return whether both terms are `[batch, sequence, hidden]`, as the fused op demands."""
    shapes = [required(term).shape for term in addition.inputs]
    return all(shape is not None and len(shape) == 3 for shape in shapes) and (
        shapes[0] == shapes[1]
    )


def lower_activations(editor: Editor, _: Precision) -> None:
    """Replace `x * sigmoid(x)` by one op.

    Args:
        editor: The graph.
        _: The same for every precision.
    """
    for node in editor.nodes("Mul"):
        states = required(node.inputs[0])
        sigmoid = producer_of(node.inputs[1], "Sigmoid")
        if sigmoid is None or sigmoid.inputs[0] is not states:
            continue
        (output,) = editor.add(node, "QuickGelu", [states], {"alpha": 1.0}, domain=MICROSOFT)
        editor.replace(node.outputs[0], output)
