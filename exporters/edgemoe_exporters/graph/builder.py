"""Build the primitive ops that replace a custom op; for the lowerings of both flavours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from edgemoe.errors import ExportError
from edgemoe_exporters.graph.initializers import add_initializer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

FLOAT32 = ir.DataType.FLOAT


class Emitter:
    """Collects nodes, and the constants they need; a constant is stored once per graph.

    Args:
        graph: The main graph, which owns the constants.
        compute: Type of activations and weights; router, norms and softmax are float32.
        prefix: Prefix of the nodes' names.
    """

    def __init__(self, graph: ir.Graph, compute: ir.DataType, prefix: str) -> None:
        self.graph = graph
        self.compute = compute
        self.prefix = prefix
        self._tape = ir.tape.Tape()

    @property
    def nodes(self) -> Sequence[ir.Node]:
        """The nodes so far, in the order in which they were added."""
        return self._tape.nodes

    def call(self, op: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """Add a node with one output."""
        return self.call_many(op, 1, *inputs, **attributes)[0]

    def call_many(
        self, op: str, outputs: int, *inputs: ir.Value | None, **attributes: Any
    ) -> Sequence[ir.Value]:
        """Add a node with several outputs."""
        name = f"{self.prefix}/{op}_{len(self.nodes)}"
        values = self._tape.op_multi_out(op, inputs, attributes, num_outputs=outputs, name=name)
        for index, value in enumerate(values):
            value.name = f"{name}:{index}"
        return values

    def integers(self, *values: int) -> ir.Value:
        """Return a constant int64 vector."""
        name = "edgemoe/int64_" + "_".join(str(value).replace("-", "m") for value in values)
        return self._constant(name, lambda: np.array(values, dtype=np.int64))

    def integer(self, value: int) -> ir.Value:
        """Return a constant int64 scalar."""
        name = f"edgemoe/int64_scalar_{value}".replace("-", "m")
        return self._constant(name, lambda: np.array(value, dtype=np.int64))

    def number(self, value: float, dtype: ir.DataType = FLOAT32) -> ir.Value:
        """Return a constant scalar of a floating type."""
        name = f"edgemoe/{dtype.name.lower()}_{value!r}".replace("-", "m")
        return self._constant(name, lambda: np.array(value, dtype=dtype.numpy()))

    def wide(self, value: ir.Value) -> ir.Value:
        """Return `value` as float32."""
        return value if self.compute == FLOAT32 else self.call("Cast", value, to=FLOAT32)

    def narrow(self, value: ir.Value) -> ir.Value:
        """Return a float32 `value` in the type of activations."""
        return value if self.compute == FLOAT32 else self.call("Cast", value, to=self.compute)

    def branch(self, name: str) -> Emitter:
        """Return an emitter for a branch of an If; its constants are the main graph's."""
        return Emitter(self.graph, self.compute, f"{self.prefix}/{name}")

    def _constant(self, name: str, make: Callable[[], np.ndarray[Any, Any]]) -> ir.Value:
        known = self.graph.initializers.get(name)
        if known is not None:
            return known
        return add_initializer(self.graph, name, ir.tensor(make(), name=name))


def size_of(value: ir.Value, axis: int) -> int:
    """Return a dimension that the trace knows.

    Raises:
        ExportError: The dimension is dynamic or unknown.
    """
    size = None if value.shape is None else value.shape[axis]
    if not isinstance(size, int):
        raise ExportError(
            f"dimension {axis} of {value.name} must be known, got {size}. This is a defect of "
            "the trace: please report it."
        )
    return size
