"""Normalisation and activation as onnxruntime's fused ops."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgemoe_exporters.ort.editor import MICROSOFT, TRACED, Editor, producer_of, required

if TYPE_CHECKING:
    import onnx_ir as ir

    from edgemoe_exporters.ort.precision import Precision


def lower_norms(editor: Editor, _: Precision) -> None:
    """Replace every RMSNorm, together with the residual addition before it.

    Args:
        editor: The graph.
        _: The same for every precision.
    """
    for node in editor.nodes("RMSNorm", TRACED):
        states, weight = required(node.inputs[0]), required(node.inputs[1])
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


def _can_fuse(addition: ir.Node) -> bool:
    """Tell whether both terms are ``[batch, sequence, hidden]``, as the fused op demands."""
    shapes = [required(term).shape for term in addition.inputs]
    return all(shape is not None and len(shape) == 3 for shape in shapes) and (
        shapes[0] == shapes[1]
    )


def lower_activations(editor: Editor, _: Precision) -> None:
    """Replace ``x * sigmoid(x)`` by one op.

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
