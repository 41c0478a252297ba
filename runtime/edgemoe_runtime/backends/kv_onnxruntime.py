"""Key-value caches that stay where onnxruntime keeps them; no copy through numpy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from edgemoe_runtime.manifest_parts import KvCache

_NUMPY_TYPES: dict[str, type[np.generic]] = {"float32": np.float32, "float16": np.float16}
_ONNX_BFLOAT16 = 16


class KvBinding(Protocol):
    """A cache bound to an IOBinding whose first output is the logits."""

    def attach(self, binding: Any) -> None:
        """Bind to an IOBinding instead of the last one."""
        ...

    def before_run(self) -> None:
        """Bind what the next run reads and writes."""
        ...

    def after_run(self) -> None:
        """Take over what the run wrote."""
        ...

    def mark(self) -> object:
        """Return the state; None where the length alone tells it.

        After another answer than None the next run must use another IOBinding.
        """
        ...

    def rewind(self, mark: object) -> None:
        """Go back to a state."""
        ...


def make_kv_cache(ort: Any, cache: KvCache, max_length: int, device: str) -> KvBinding:
    """Allocate the cache in the form that the graph has.

    Args:
        ort: the onnxruntime module.
        cache: form, type and shapes.
        max_length: tokens to hold.
        device: `cpu` or `cuda`.
    """
    if cache.form == "shared_buffer":
        return SharedKvBinding(ort, cache, max_length, device)
    return ConcatKvBinding(ort, cache, device)


class SharedKvBinding:
    """One buffer per layer, bound once as both past and present."""

    def __init__(self, ort: Any, cache: KvCache, max_length: int, device: str) -> None:
        self._values = [
            (past, present, _allocate(ort, shape, cache.dtype, device))
            for past, present, shape in _names_and_shapes(cache, max_length)
        ]

    def attach(self, binding: Any) -> None:
        """Bind every buffer as past and present."""
        for past, present, value in self._values:
            binding.bind_ortvalue_input(past, value)
            binding.bind_ortvalue_output(present, value)

    def before_run(self) -> None:
        """Do nothing: the binding never changes."""

    def after_run(self) -> None:
        """Do nothing: new positions were written in place."""

    def mark(self) -> object:
        """Return None: the length alone says what is valid."""
        return None

    def rewind(self, mark: object) -> None:
        """Do nothing: positions past the length are overwritten before they are read."""


@dataclass(frozen=True)
class _PresentValues:
    """Present values, and the IOBinding whose list of outputs they live in."""

    values: list[Any]
    binding: Any


class ConcatKvBinding:
    """Each run's present values become the next run's past values, wherever they lie."""

    def __init__(self, ort: Any, cache: KvCache, device: str) -> None:
        self._binding: Any = None
        self._device = device
        self._names: list[tuple[str, str]] = []
        self._empty: list[Any] = []
        for past, present, shape in _names_and_shapes(cache, 0):
            self._names.append((past, present))
            self._empty.append(_allocate(ort, shape, cache.dtype, device))
        self._past = self._empty

    def attach(self, binding: Any) -> None:
        """Use this IOBinding for the runs that follow."""
        self._binding = binding

    def before_run(self) -> None:
        """Bind the last present values as past, and let onnxruntime allocate new ones."""
        for (past, present), value in zip(self._names, self._past, strict=True):
            self._binding.bind_ortvalue_input(past, value)
            self._binding.bind_output(present, self._device)

    def after_run(self) -> None:
        """Keep the present values; the first output is the logits."""
        self._past = self._binding.get_outputs()[1:]

    def mark(self) -> object:
        """Return the present values together with what keeps them as they are.

        Up to onnxruntime 1.23 the values are references into the IOBinding's outputs, which
        its next run would replace.
        """
        return _PresentValues(self._past, self._binding)

    def rewind(self, mark: object) -> None:
        """Go back to the marked values; None means the empty cache."""
        self._past = mark.values if isinstance(mark, _PresentValues) else self._empty


def _names_and_shapes(
    cache: KvCache, length: int
) -> list[tuple[str, str, tuple[int, int, int, int]]]:
    return [
        (
            f"past_key_values.{index}.{kind}",
            f"present.{index}.{kind}",
            (1, layer.heads, length, layer.key_dim if kind == "key" else layer.value_dim),
        )
        for index, layer in enumerate(cache.layers)
        for kind in ("key", "value")
    ]


def _allocate(ort: Any, shape: tuple[int, ...], dtype: str, device: str) -> Any:
    if dtype == "bfloat16":  # numpy has no such type
        return ort.OrtValue.ortvalue_from_shape_and_type(shape, _ONNX_BFLOAT16, device, 0)
    # zeros, not garbage: a NaN in an unused position would survive a multiplication by 0.
    # On the CPU the value shares numpy's pages, which cost nothing until they are written.
    zeros = np.zeros(shape, dtype=_NUMPY_TYPES[dtype])
    return ort.OrtValue.ortvalue_from_numpy(zeros, device, 0)
