"""Key-value caches that stay where onnxruntime keeps them; no copy through numpy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np

if TYPE_CHECKING:
    from edgemoe_runtime.manifest_parts import KvCache

_NUMPY_TYPES: dict[str, type[np.generic]] = {"float32": np.float32, "float16": np.float16}
_ONNX_BFLOAT16 = 16


class KvBinding(Protocol):
    """A cache bound to one IOBinding whose first output is the logits."""

    def before_run(self) -> None:
        """Bind what the next run reads and writes."""
        ...

    def after_run(self) -> None:
        """Take over what the run wrote."""
        ...

    def mark(self) -> object:
        """Return the state."""
        ...

    def rewind(self, mark: object) -> None:
        """Go back to a state."""
        ...


def bind_kv_cache(
    ort: Any, binding: Any, cache: KvCache, max_length: int, device: str
) -> KvBinding:
    """Allocate and bind the cache in the form that the graph has.

    Args:
        ort: the onnxruntime module.
        binding: an IOBinding with the logits bound already.
        cache: form, type and shapes.
        max_length: tokens to hold.
        device: `cpu` or `cuda`.
    """
    if cache.form == "shared_buffer":
        return SharedKvBinding(ort, binding, cache, max_length, device)
    return ConcatKvBinding(ort, binding, cache, device)


class SharedKvBinding:
    """One buffer per layer, bound once as both past and present."""

    def __init__(
        self, ort: Any, binding: Any, cache: KvCache, max_length: int, device: str
    ) -> None:
        self._values: list[Any] = []
        for past, present, shape in _names_and_shapes(cache, max_length):
            value = _allocate(ort, shape, cache.dtype, device)
            self._values.append(value)
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


class ConcatKvBinding:
    """Each run's present values become the next run's past values, wherever they lie."""

    def __init__(self, ort: Any, binding: Any, cache: KvCache, device: str) -> None:
        self._binding = binding
        self._device = device
        self._names: list[tuple[str, str]] = []
        self._empty: list[Any] = []
        for past, present, shape in _names_and_shapes(cache, 0):
            self._names.append((past, present))
            self._empty.append(_allocate(ort, shape, cache.dtype, device))
        self._past = self._empty

    def before_run(self) -> None:
        """Bind the last present values as past, and let onnxruntime allocate new ones."""
        for (past, present), value in zip(self._names, self._past, strict=True):
            self._binding.bind_ortvalue_input(past, value)
            self._binding.bind_output(present, self._device)

    def after_run(self) -> None:
        """Keep the present values; the first output is the logits."""
        self._past = self._binding.get_outputs()[1:]

    def mark(self) -> object:
        """Return the values themselves: runs never change them."""
        return self._past

    def rewind(self, mark: object) -> None:
        """Go back to the marked values; None means the empty cache."""
        self._past = self._empty if mark is None else cast("list[Any]", mark)


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
