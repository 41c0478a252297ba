"""Read and replace the content of a graph's weights; for the lowerings of both flavours."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from edgemoe.errors import ExportError


def weight_of(value: ir.Value) -> np.ndarray[Any, Any]:
    """Return the content of an initializer.

    Raises:
        ExportError: It is computed in the graph.
    """
    if value.const_value is None:
        raise ExportError(f"{value.name} must be a weight, got a computed value.")
    return value.const_value.numpy()


def set_weight(
    value: ir.Value, array: np.ndarray[Any, Any], dtype: ir.DataType | None = None
) -> None:
    """Give an initializer another content, in another floating type where asked for.

    Raises:
        ExportError: A number is beyond what the type can hold.
    """
    if dtype is not None:
        array = in_range(array, dtype.numpy(), str(value.name))
    tensor = ir.tensor(np.ascontiguousarray(array), name=value.name)
    value.const_value = tensor
    value.type = ir.TensorType(tensor.dtype)
    value.shape = ir.Shape(tensor.shape.numpy())


def in_range(
    array: np.ndarray[Any, Any], dtype: np.dtype[Any], name: str
) -> np.ndarray[Any, Any]:
    """Convert a weight to a floating type.

    Raises:
        ExportError: A number is beyond what the type can hold.
    """
    with np.errstate(over="ignore"):  # checked below, with the weight's name
        converted = array.astype(dtype)
    if not np.isfinite(converted).all() and np.isfinite(array).all():
        largest = float(np.abs(array).max())
        raise ExportError(
            f"weights must be within the range of {np.dtype(dtype).name}, got {largest:.3g} "
            f"in {name}. Export with --precision fp32."
        )
    return converted


def narrow_attributes(node: ir.Node, dtype: ir.DataType) -> None:
    """Make a traced node that gives float32 by its attributes give another floating type."""
    wide = ir.DataType.FLOAT
    if node.op_type == "Cast" and node.attributes["to"].as_int() == wide:
        node.attributes["to"] = ir.AttrInt64("to", dtype)
    elif node.op_type in {"Constant", "ConstantOfShape"}:
        attribute = node.attributes.get("value")
        if attribute is not None and attribute.as_tensor().dtype == wide:
            array = attribute.as_tensor().numpy().astype(dtype.numpy())
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(array))
