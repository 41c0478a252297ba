"""Key-value caches that stay where onnxruntime keeps them; no copy through numpy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgemoe_runtime.bundle.cache_spec import CacheTensor, KvCache

_NUMPY_TYPES: dict[str, type[np.generic]] = {"float32": np.float32, "float16": np.float16}
_ONNX_BFLOAT16 = 16


class KvBinding(Protocol):
    """A cache bound to an IOBinding whose first outputs are the logits and their like."""

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
        """Return the state; None where the length alone determines it.

        After another answer than None the next run must use another IOBinding.
        """
        ...

    def rewind(self, mark: object) -> None:
        """Go back to a state."""
        ...


def make_kv_cache(
    ort: Any, cache: KvCache, max_length: int, device: str, *, first_output: int = 1
) -> KvBinding:
    """Allocate the cache in the form that the graph has.

    Args:
        ort: the onnxruntime module.
        cache: form, type and shapes.
        max_length: tokens to hold.
        device: `cpu` or `cuda`.
        first_output: outputs that are bound before those of the cache.
    """
    if cache.form != "shared_buffer":
        return ConcatKvBinding(ort, cache.tensors(0), device, first_output)
    shared = SharedKvBinding(ort, cache.pairs(max_length), device)
    if not cache.states:
        return shared
    first = first_output + len(cache.pairs(0))
    return MixedKvBinding(shared, ConcatKvBinding(ort, cache.others(0), device, first))


class SharedKvBinding:
    """One buffer per layer, bound once as both past and present."""

    def __init__(self, ort: Any, tensors: Sequence[CacheTensor], device: str) -> None:
        self._values = [
            (tensor.past, tensor.present, _allocate(ort, tensor, device)) for tensor in tensors
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

    def __init__(
        self, ort: Any, tensors: Sequence[CacheTensor], device: str, first_output: int
    ) -> None:
        self._binding: Any = None
        self._device = device
        self._first_output = first_output
        self._names = [(tensor.past, tensor.present) for tensor in tensors]
        self._empty = [_allocate(ort, tensor, device) for tensor in tensors]
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
        """Keep the present values; the logits and others are bound before them."""
        self._past = self._binding.get_outputs()[self._first_output :]

    def mark(self) -> object:
        """Return the present values together with what keeps them as they are.

        Up to onnxruntime 1.23 the values are references into the IOBinding's outputs, which
        its next run would replace.
        """
        return _PresentValues(self._past, self._binding)

    def rewind(self, mark: object) -> None:
        """Go back to the marked values; None means the empty cache."""
        self._past = mark.values if isinstance(mark, _PresentValues) else self._empty


class MixedKvBinding:
    """Keys and values in shared buffers, and states that each run replaces."""

    def __init__(self, shared: SharedKvBinding, replaced: ConcatKvBinding) -> None:
        self._shared = shared
        self._replaced = replaced

    def attach(self, binding: Any) -> None:
        """Bind the buffers; the states' outputs are to come after theirs."""
        self._shared.attach(binding)
        self._replaced.attach(binding)

    def before_run(self) -> None:
        """Bind the last states, and let onnxruntime allocate new ones."""
        self._replaced.before_run()

    def after_run(self) -> None:
        """Keep the new states."""
        self._replaced.after_run()

    def mark(self) -> object:
        """Return the states: the length alone says what is valid of the buffers."""
        return self._replaced.mark()

    def rewind(self, mark: object) -> None:
        """Go back to the marked states; None means those at the start."""
        self._replaced.rewind(mark)


def _allocate(ort: Any, tensor: CacheTensor, device: str) -> Any:
    if tensor.dtype == "bfloat16":  # numpy has no such type
        return ort.OrtValue.ortvalue_from_shape_and_type(
            tensor.shape, _ONNX_BFLOAT16, device, 0
        )
    # zeros, not garbage: a NaN in an unused position would survive a multiplication by 0.
    # On the CPU the value shares numpy's pages, which cost nothing until they are written.
    zeros = np.zeros(tensor.shape, dtype=_NUMPY_TYPES[tensor.dtype])
    return ort.OrtValue.ortvalue_from_numpy(zeros, device, 0)
