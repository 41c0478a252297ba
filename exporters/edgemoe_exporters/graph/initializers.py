"""Read and replace the content of a graph's weights; for the lowerings of both flavours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from edgemoe.errors import ExportError

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

    from edgemoe_exporters.graph.lazy_weights import LazyWeight


def add_initializer(
    graph: ir.Graph,
    name: str,
    tensor: ir.TensorProtocol,
    metadata: dict[str, str] | None = None,
) -> ir.Value:
    """Register a new initializer.

    Args:
        graph: The graph that owns it.
        name: Its name.
        tensor: Its content, which gives its type and shape.
        metadata: Its metadata.

    Returns:
        The initializer.
    """
    value = ir.val(name, const_value=tensor, metadata_props=metadata)
    graph.register_initializer(value)
    return value


def weight_of(value: ir.Value) -> np.ndarray[Any, Any]:
    """Return the content of an initializer that is small enough to be read early.

    Raises:
        ExportError: It is computed in the graph.
    """
    if value.const_value is None:
        raise ExportError(f"{value.name} must be a weight, got a computed value.")
    return value.const_value.numpy()


def set_weight(value: ir.Value, content: LazyWeight, dtype: ir.DataType | None = None) -> None:
    """Replace the content of an initializer, converted to a floating type where one is given.

    Args:
        value: The initializer.
        content: Computed when the initializer is written.
        dtype: The type; numbers beyond it end in an error then.
    """
    tensor = content.tensor(str(value.name), dtype)
    value.const_value = tensor
    value.type = ir.TensorType(tensor.dtype)
    value.shape = ir.Shape(tensor.shape.numpy())


def convert_once(value: ir.Value, convert: Callable[[], LazyWeight]) -> None:
    """Replace the content of an initializer, unless that was done already.

    A layer that runs several times for a token has as many nodes, and one set of weights.

    Args:
        value: The initializer.
        convert: Gives the new content.
    """
    if _CONVERTED not in value.meta:
        set_weight(value, convert())
        value.meta[_CONVERTED] = True


_CONVERTED = "edgemoe.converted"
# Where a traced node has the state that it reads.
_STATES = {"CausalConv": 1, "JoinPositions": 1, "LinearAttention": 5}


def state_values(graph: ir.Graph) -> set[ir.Value]:
    """Return inputs and outputs that are states of a fixed size: float32 in every precision.

    Args:
        graph: A traced graph.

    Returns:
        The values.
    """
    found: set[ir.Value] = set()
    for node in graph:
        if node.op_type in _STATES:
            past = node.inputs[_STATES[node.op_type]]
            assert past is not None
            found.update((past, node.outputs[1]))
    return found


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
