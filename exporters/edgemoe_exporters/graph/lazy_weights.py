"""Weights that are computed when they are written, one at a time.

A graph of a model that is larger than memory names its weights long before they are read. What
a lowering does to a weight (another layout, another type, blocks of 4 bits) is kept as a
function, and `bundle.writer.BundleWriter` calls it when it writes the
bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import onnx_ir as ir

from edgemoe.errors import ExportError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Result = TypeVar("Result")


@dataclass(frozen=True)
class LazyWeight:
    """An array that is computed when it is read.

    Attributes:
        shape: Its shape.
        dtype: Its type.
        compute: Computes it, each time anew.
    """

    shape: tuple[int, ...]
    dtype: ir.DataType
    compute: Callable[[], np.ndarray[Any, Any]]

    @classmethod
    def of(cls, value: ir.Value) -> LazyWeight:
        """Return an initializer's content as it is now; it may be replaced afterwards.

        Raises:
            ExportError: It is computed in the graph.
        """
        tensor = value.const_value
        if tensor is None:
            raise ExportError(f"{value.name} must be a weight, got a computed value.")
        return cls(tuple(tensor.shape.numpy()), tensor.dtype, tensor.numpy)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.numpy().itemsize

    def map(
        self,
        change: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]],
        shape: Sequence[int] | None = None,
        dtype: ir.DataType | None = None,
    ) -> LazyWeight:
        """Return the array after a change.

        Args:
            change: The function.
            shape: Shape of its result; that of the array by default.
            dtype: Type of its result; that of the array by default.

        Returns:
            Its result, computed when it is read.
        """
        return LazyWeight(
            self.shape if shape is None else tuple(shape),
            self.dtype if dtype is None else dtype,
            lambda: change(self.compute()),
        )

    def tensor(self, name: str, dtype: ir.DataType | None = None) -> ir.LazyTensor:
        """Return a tensor for a graph.

        Args:
            name: Its name.
            dtype: A floating type to convert to; numbers beyond it end in an
                `edgemoe.errors.ExportError` when the tensor is written.

        Returns:
            A tensor that computes its content each time that it is read.
        """
        wanted = self.dtype if dtype is None else dtype

        def make() -> ir.TensorProtocol:
            array = in_range(self.compute(), wanted.numpy(), name)
            # Not ascontiguousarray, which gives a scalar an axis.
            return ir.tensor(np.asarray(array, order="C"), name=name)

        return ir.LazyTensor(make, wanted, ir.Shape(self.shape), name=name)


class LatestResult:
    """The result that was computed last: tensors made of it are written one after the other."""

    def __init__(self) -> None:
        self._owner: object = None
        self._result: Any = None

    def get(self, owner: object, compute: Callable[[], Result]) -> Result:
        """Return a result, computed unless it is the last one.

        Args:
            owner: Whose result it is; one owner always computes the same.
            compute: Computes it.

        Returns:
            The result.
        """
        if self._owner is not owner or self._result is None:
            # Before the next one is made, so that there is one of them in memory.
            self._owner = self._result = None
            self._result = compute()
            self._owner = owner
        result: Result = self._result
        return result


def in_range(
    array: np.ndarray[Any, Any], dtype: np.dtype[Any], name: str
) -> np.ndarray[Any, Any]:
    """Convert a weight to a floating type.

    Raises:
        ExportError: A number is beyond what the type can hold.
    """
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):  # checked below, with the weight's name
        converted = array.astype(dtype)
    if not np.isfinite(converted).all() and np.isfinite(array).all():
        largest = float(np.abs(array).max())
        raise ExportError(
            f"weights must be within the range of {np.dtype(dtype).name}, got {largest:.3g} "
            f"in {name}. Export with --precision fp32."
        )
    return converted
