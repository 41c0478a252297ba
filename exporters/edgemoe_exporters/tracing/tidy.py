"""Clean up after torch's exporter: ops that engines cannot read, repeated arithmetic."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import Sequential, common

from edgemoe_exporters.graph.initializers import add_initializer

# Larger tensors are weights, or stay as they are.
_FOLDED_NUMBERS = 64


def tidy(traced: ir.Model) -> None:
    """Remove source paths, constants, sequences and repeated arithmetic.

    Args:
        traced: A traced model; it is changed.
    """
    for node in traced.graph:
        if node.op_type == "Reshape" and node.domain == "":
            _fix_shape(traced.graph, node)
        elif node.op_type == "Slice" and node.domain == "":
            _skip_whole_slice(node)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(traced)
    for node in list(traced.graph):
        if node.op_type == "Reshape" and node.domain == "":
            _fold(traced.graph, node)
        elif node.op_type == "SplitToSequence":
            _split_directly(traced.graph, node)
    Sequential(
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.ClearMetadataAndDocStringPass(),
    )(traced)
    for value in traced.graph.initializers.values():
        value.metadata_props.clear()
        value.meta.clear()
    traced.graph.name = "edgemoe"
    traced.producer_name = "edgemoe"
    traced.producer_version = None


def _skip_whole_slice(node: ir.Node) -> None:
    """Bypass a forward slice that takes everything, such as `hidden[:, 0:]`."""
    data, output = node.inputs[0], node.outputs[0]
    if data is not None and data.shape is not None and data.shape == output.shape:
        output.replace_all_uses_with(data)


def _fix_shape(graph: ir.Graph, node: ir.Node) -> None:
    """Make a Reshape's shape a constant where at most one size is left to be inferred."""
    data, output = node.inputs[0], node.outputs[0]
    if data is None or data.shape is None or output.shape is None:
        return
    sizes: list[int] = []
    for axis, size in enumerate(output.shape):
        if isinstance(size, int):
            sizes.append(size)
        elif axis < len(data.shape) and data.shape[axis] == size:
            sizes.append(0)
        else:
            sizes.append(-1)
    if sizes.count(-1) > 1:
        return
    name = "shape_" + "_".join(str(size).replace("-", "n") for size in sizes)
    node.replace_input_with(1, _constant(graph, name, np.array(sizes, dtype=np.int64)))
    node.attributes.clear()


def _fold(graph: ir.Graph, node: ir.Node) -> None:
    """Fold a Reshape of a small constant: TensorRT wants axes that are constants."""
    data, shape = (_small(value) for value in node.inputs)
    if data is None or shape is None:
        return
    folded = _constant(graph, f"{node.outputs[0].name}_folded", data.reshape(shape.tolist()))
    node.outputs[0].replace_all_uses_with(folded)


def _split_directly(graph: ir.Graph, node: ir.Node) -> None:
    """Split into values, not into a sequence of them, which TensorRT has not."""
    data, sizes = node.inputs
    axis = node.attributes["axis"].as_int()
    readers = [reader for reader, _ in node.outputs[0].uses()]
    indices = [_small(reader.inputs[1]) for reader in readers]
    given = _small(sizes)
    if (
        data is None
        or data.shape is None
        or given is None
        or any(index is None for index in indices)
    ):
        return
    if given.ndim == 0:
        whole, part = data.shape[axis], int(given)
        if not isinstance(whole, int):
            return
        given = np.array([min(part, whole - start) for start in range(0, whole, part)])
    name = "split_" + "_".join(map(str, given))
    split = ir.Node(
        "",
        "Split",
        [data, _constant(graph, name, given.astype(np.int64))],
        attributes=[ir.AttrInt64("axis", axis)],
        num_outputs=len(given),
        name=f"{node.name}_direct",
    )
    for position, output in enumerate(split.outputs):
        output.name = f"{node.name}_part_{position}"
        output.type = data.type
        shape = list(data.shape)
        shape[axis] = int(given[position])
        output.shape = ir.Shape(shape)
    graph.insert_before(node, [split])
    for reader, index in zip(readers, indices, strict=True):
        assert index is not None
        reader.outputs[0].replace_all_uses_with(split.outputs[int(index)])


def _small(value: ir.Value | None) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]] | None:
    """Return the content of a constant of few integers."""
    if value is None or value.const_value is None:
        return None
    tensor = value.const_value
    if tensor.dtype != ir.DataType.INT64 or tensor.size > _FOLDED_NUMBERS:
        return None
    return tensor.numpy()


def _constant(
    graph: ir.Graph, name: str, array: np.ndarray[tuple[int, ...], np.dtype[np.int64]]
) -> ir.Value:
    if name not in graph.initializers:
        add_initializer(graph, name, ir.tensor(array, name=name))
    return graph.initializers[name]
