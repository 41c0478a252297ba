"""Linear layers and the embedding: MatMul, MatMulNBits, Gather, GatherBlockQuantized."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from edgemoe_exporters.graph.editor import (
    Attribute,
    Editor,
    producer_of,
    required,
    size_of,
    sole_consumer,
)
from edgemoe_exporters.graph.lazy_weights import LazyWeight
from edgemoe_exporters.graph.metadata import MICROSOFT, SAME_BYTES
from edgemoe_exporters.lowering.fused.sensitive import find_sensitive
from edgemoe_exporters.lowering.quantize_once import quantize_later

if TYPE_CHECKING:
    from typing import Any

    import numpy as np
    import onnx_ir as ir

    from edgemoe_exporters.precision import Precision

# A matrix with fewer rows saves nothing worth its loss: gates of shared experts.
_MIN_ROWS = 16


def lower_linears(editor: Editor, precision: Precision) -> None:
    """Replace `x @ transpose(W)` by one op that reads W as it is stored.

    Args:
        editor: The graph.
        precision: MatMul for fp32 and fp16, MatMulNBits for the others.
    """
    sensitive = find_sensitive(editor)
    for node in editor.nodes("MatMul"):
        transpose = producer_of(node.inputs[1], "Transpose")
        if transpose is None or not required(transpose.inputs[0]).is_initializer():
            continue
        weight, states = required(transpose.inputs[0]), required(node.inputs[0])
        if not can_quantise(weight, precision):
            (output,) = editor.add(
                node, "FusedMatMul", [states, weight], {"transB": 1}, domain=MICROSOFT
            )
            editor.replace(node.outputs[0], output)
            continue
        addition = sole_consumer(node.outputs[0], "Add")
        bias = None if addition is None else _bias(addition, node.outputs[0])
        output = _quantised(
            editor, node, states, weight, bias, precision.of(weight.name in sensitive)
        )
        if bias is None or addition is None:
            editor.replace(node.outputs[0], output)
        else:
            editor.replace(addition.outputs[0], output)
    # A linear layer over tokens without a batch is traced as Gemm.
    for node in editor.nodes("Gemm"):
        weight, states = required(node.inputs[1]), required(node.inputs[0])
        if weight.is_initializer() and can_quantise(weight, precision):
            bias = node.inputs[2] if len(node.inputs) > 2 else None
            chosen = precision.of(weight.name in sensitive)
            output = _quantised(editor, node, states, weight, bias, chosen)
            editor.replace(node.outputs[0], output)


def can_quantise(weight: ir.Value, precision: Precision) -> bool:
    """Return whether a matrix is stored in quantised blocks.

    Args:
        weight: An initializer `[rows, columns]`.
        precision: The precision of the graph.

    Returns:
        Whether it is.
    """
    rows, columns = size_of(weight, 0), size_of(weight, 1)
    return bool(precision.bits) and rows >= _MIN_ROWS and columns % precision.block == 0


def _parts(
    editor: Editor, weight: ir.Value, precision: Precision
) -> tuple[ir.Value, ir.Value, ir.Value | None]:
    """Quantise a matrix once, however many nodes read it."""
    name = f"{weight.name}.quantised"
    if name not in editor.graph.initializers:
        parts = quantize_later(
            editor.latest,
            LazyWeight.of(weight),
            precision.bits,
            precision.block,
            precision.symmetric,
        )
        rows, width = parts["packed"].shape
        bytes_per_block = precision.block * precision.bits // 8
        shape = (rows, width // bytes_per_block, bytes_per_block)
        parts["packed"] = parts["packed"].map(lambda packed: packed.reshape(shape), shape)
        for part, content in parts.items():
            named = name if part == "packed" else f"{weight.name}.{part}"
            editor.initializer(named, content.tensor(named))
    initializers = editor.graph.initializers
    return (
        initializers[name],
        initializers[f"{weight.name}.scales"],
        initializers.get(f"{weight.name}.zero_points"),
    )


def _quantised(
    editor: Editor,
    node: ir.Node,
    states: ir.Value,
    weight: ir.Value,
    bias: ir.Value | None,
    precision: Precision,
) -> ir.Value:
    blocks, scales, zeros = _parts(editor, weight, precision)
    inputs: list[ir.Value | None] = [states, blocks, scales, zeros, None, bias]
    while inputs[-1] is None:
        inputs.pop()
    attributes: dict[str, Attribute] = {
        "N": size_of(weight, 0),
        "K": size_of(weight, 1),
        "bits": precision.bits,
        "block_size": precision.block,
        "accuracy_level": precision.accuracy_level,
    }
    return editor.add(node, "MatMulNBits", inputs, attributes, domain=MICROSOFT)[0]


def _bias(addition: ir.Node, product: ir.Value) -> ir.Value | None:
    for term in addition.inputs:
        if term is not product and term is not None and term.is_initializer():
            return term
    return None


def lower_embedding(editor: Editor, precision: Precision) -> None:
    """Read the embedding in blocks, from the bytes of the head where the two are tied.

    Args:
        editor: The graph.
        precision: The precision of the graph.
    """
    for node in editor.nodes("Gather"):
        weight, ids = required(node.inputs[0]), required(node.inputs[1])
        if not weight.is_initializer() or weight.shape is None or len(weight.shape) != 2:
            continue
        if not can_quantise(weight, precision):
            continue
        chosen = precision.of(sensitive=True)
        blocks, scales, zeros = _parts(editor, weight, chosen)
        # The head wants [rows, blocks, bytes], the gather [rows, bytes]: the same bytes.
        width = size_of(weight, 1) * chosen.bits // 8
        # A second name for them costs nothing, equal bytes being stored once; a Reshape would
        # be folded when a session opens, into a copy in memory.
        shape = (size_of(weight, 0), width)
        name = f"{weight.name}.rows"
        if name not in editor.graph.initializers:
            rows = LazyWeight.of(blocks).map(partial(_reshape, shape), shape).tensor(name)
            rows.metadata_props[SAME_BYTES] = str(blocks.name)
            editor.initializer(name, rows)
        flat = editor.graph.initializers[name]
        inputs = [flat, ids, scales] if zeros is None else [flat, ids, scales, zeros]
        (output,) = editor.add(
            node,
            "GatherBlockQuantized",
            inputs,
            {
                "bits": chosen.bits,
                "block_size": chosen.block,
                "gather_axis": 0,
                "quantize_axis": 1,
            },
            domain=MICROSOFT,
        )
        editor.replace(node.outputs[0], output)


def _reshape(shape: tuple[int, ...], array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    # What np.reshape calls `shape` has another name before numpy 2.1.
    return array.reshape(shape)
