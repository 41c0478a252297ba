"""Precisions of a graph: types, bits and blocks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from edgemoe.errors import ExportError

if TYPE_CHECKING:
    from edgemoe.models.shapes import ModelShape
    from edgemoe_exporters.graph.editor import Editor


@dataclass(frozen=True, kw_only=True)
class Precision:
    """A number format of weights and activations.

    Attributes:
        name: Its name, as given to `--precision`.
        dtype: Type of activations, of the cache and of weights that are not quantised.
        bits: Bits of a quantised weight; 0 for none.
        sensitive_bits: Bits of those matrices that would lose most with fewer.
        block: Weights of a row that share a scale.
        symmetric: Whether the zero point is the middle of the range.
        accuracy_level: 4 lets kernels round activations to int8 block by block, which is
            several times as fast; 0 keeps them as they are.
    """

    name: str
    dtype: ir.DataType = ir.DataType.FLOAT
    bits: int = 0
    sensitive_bits: int = 0
    block: int = 32
    symmetric: bool = False
    accuracy_level: int = 4

    @property
    def numpy(self) -> np.dtype[np.floating]:
        """The numpy type of activations."""
        return np.dtype(self.dtype.numpy())

    @property
    def is_exact(self) -> bool:
        """Whether the graph is compared with the eager model digit by digit."""
        return self.dtype == ir.DataType.FLOAT and not self.bits

    def of(self, sensitive: bool) -> Precision:
        """Return this precision for one matrix.

        Args:
            sensitive: Whether the matrix is one of those that would lose most.

        Returns:
            This precision, with the bits of that matrix.
        """
        return replace(self, bits=self.sensitive_bits) if sensitive else self

    def cast(self, editor: Editor, before: ir.Node, value: ir.Value) -> ir.Value:
        """Cast a float32 value to the type of activations.

        Args:
            editor: The graph.
            before: The node that the cast comes before.
            value: float32.

        Returns:
            The value itself where activations are float32.
        """
        if self.dtype == ir.DataType.FLOAT:
            return value
        (output,) = editor.add(before, "Cast", [value], {"to": int(self.dtype)})
        return output

    def to_float32(self, editor: Editor, before: ir.Node, value: ir.Value) -> ir.Value:
        """Cast an activation to float32.

        Args:
            editor: The graph.
            before: The node that the cast comes before.
            value: Of the type of activations.

        Returns:
            The value itself where activations are float32.
        """
        if self.dtype == ir.DataType.FLOAT:
            return value
        (output,) = editor.add(before, "Cast", [value], {"to": int(ir.DataType.FLOAT)})
        return output


PRECISIONS: dict[str, Precision] = {
    "fp32": Precision(name="fp32"),
    "fp16": Precision(name="fp16", dtype=ir.DataType.FLOAT16),
    "int8": Precision(name="int8", bits=8, sensitive_bits=8),
    "int4": Precision(name="int4", bits=4, sensitive_bits=8),
}


def check_block_sizes(shape: ModelShape, name: str) -> None:
    """Check that experts' rows are a whole number of quantisation blocks.

    Their width does not matter: intermediate channels of zeros fill the last block.

    Args:
        shape: The model.
        name: A precision.

    Raises:
        ExportError: The hidden size does not fit.
    """
    precision = PRECISIONS[name]
    if precision.bits and shape.hidden_size % precision.block:
        raise ExportError(
            f"hidden_size must be a multiple of {precision.block} in {name}, got "
            f"{shape.hidden_size}. Export with --precision fp32 or fp16."
        )


def find_precision(name: str) -> Precision:
    """Find a precision by its name.

    Args:
        name: Its name, as given to `--precision`.

    Returns:
        The precision.

    Raises:
        ExportError: There is none of that name.
    """
    if name not in PRECISIONS:
        raise ExportError(f"precision must be one of {', '.join(PRECISIONS)}, got {name!r}.")
    return PRECISIONS[name]
