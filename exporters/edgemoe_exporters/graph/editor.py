"""Read and rewrite a graph: the few operations that every lowering needs.

onnx_ir has no search for the producer or the sole consumer of an op, and its
`replace_nodes_and_values` renames every new value; here only graph outputs keep their names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from edgemoe.errors import ExportError
from edgemoe_exporters.graph.initializers import add_initializer
from edgemoe_exporters.graph.lazy_weights import LatestResult

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np

Attribute = int | float | str | list[int] | list[float]


class Editor:
    """One graph being rewritten.

    Attributes:
        model: The model that the graph is in.
        graph: The graph.
        latest: The weight that was quantised last, for the several tensors made of it.
    """

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.graph = model.graph
        self.latest = LatestResult()

    def nodes(self, op_type: str, domain: str = "") -> Iterator[ir.Node]:
        """Yield the nodes of one op; the graph may change meanwhile.

        Args:
            op_type: Name of the op.
            domain: Its domain.

        Yields:
            Nodes in topological order.
        """
        yield from [n for n in self.graph if n.op_type == op_type and n.domain == domain]

    def add(
        self,
        before: ir.Node,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: dict[str, Attribute] | None = None,
        *,
        domain: str = "",
        outputs: int = 1,
    ) -> tuple[ir.Value, ...]:
        """Insert a node.

        Args:
            before: The node that it comes before.
            op_type: Name of the op.
            inputs: Its inputs, None where an optional one is left out.
            attributes: Its attributes.
            domain: Its domain.
            outputs: Number of outputs.

        Returns:
            The outputs.
        """
        node = ir.node(
            op_type, list(inputs), attributes or {}, domain=domain, num_outputs=outputs
        )
        self.graph.insert_before(before, node)
        return tuple(node.outputs)

    def constant(self, name: str, array: np.ndarray[Any, Any]) -> ir.Value:
        """Return the initializer `name`, made from `array` where it does not exist.

        Args:
            name: Name of the initializer; one name always has one content.
            array: Its content.

        Returns:
            The initializer.
        """
        if name not in self.graph.initializers:
            self.initializer(name, ir.tensor(array, name=name))
        return self.graph.initializers[name]

    def initializer(
        self, name: str, tensor: ir.TensorProtocol, metadata: dict[str, str] | None = None
    ) -> ir.Value:
        """Register a new initializer.

        Args:
            name: Its name.
            tensor: Its content.
            metadata: Its metadata.

        Returns:
            The initializer.
        """
        return add_initializer(self.graph, name, tensor, metadata)

    def replace(self, old: ir.Value, new: ir.Value) -> None:
        """Replace all uses of `old` by `new`, which takes over its name and type.

        Args:
            old: An output of a node that is no longer wanted.
            new: An output of a new node.
        """
        name, shape, kind = old.name, old.shape, old.type
        if new.shape is None:
            new.shape = shape
        if new.type is None:
            new.type = kind
        was_output = old.is_graph_output()
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        if was_output:
            old.name = None
            new.name = name

    def tidy(self) -> None:
        """Remove nodes and initializers that nothing reads any more."""
        RemoveUnusedNodesPass()(self.model)


def required(value: ir.Value | None) -> ir.Value:
    """Return an input that its op demands.

    Args:
        value: The input.

    Returns:
        The input.

    Raises:
        ExportError: It is absent.
    """
    if value is None:
        raise ExportError("a traced node must have all its inputs, got none. Trace again.")
    return value


def size_of(value: ir.Value, axis: int) -> int:
    """Return a size that the trace fixed.

    Args:
        value: Any value.
        axis: Which of its axes.

    Returns:
        The size.

    Raises:
        ExportError: The size is not known, or differs from run to run.
    """
    size = None if value.shape is None else value.shape[axis]
    if not isinstance(size, int):
        raise ExportError(
            f"axis {axis} of {value.name} must be fixed, got {size}. Trace again."
        )
    return size


def array_of(value: ir.Value) -> np.ndarray[Any, Any]:
    """Return an initializer's content.

    Args:
        value: The initializer.

    Returns:
        Its array.

    Raises:
        ExportError: The value is not an initializer.
    """
    if value.const_value is None:
        raise ExportError(f"{value.name} must be a constant to be lowered. Trace again.")
    return value.const_value.numpy()


def producer_of(value: ir.Value | None, op_type: str, domain: str = "") -> ir.Node | None:
    """Return the node that makes `value`, where it is of the given op.

    Args:
        value: Any value.
        op_type: Name of the op.
        domain: Its domain.

    Returns:
        The node, or None.
    """
    node = value.producer() if value is not None else None
    if node is not None and node.op_type == op_type and node.domain == domain:
        return node
    return None


def sole_consumer(value: ir.Value, op_type: str, domain: str = "") -> ir.Node | None:
    """Return the only node that reads `value`, where it is of the given op.

    Args:
        value: Any value.
        op_type: Name of the op.
        domain: Its domain.

    Returns:
        The node, or None.
    """
    consumers = list(value.consumers())
    if len(consumers) != 1 or value.is_graph_output():
        return None
    node = consumers[0]
    return node if node.op_type == op_type and node.domain == domain else None
