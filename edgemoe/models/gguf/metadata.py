"""The metadata of an architecture, each key of it taken into account."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar, overload

import numpy as np

from edgemoe.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgemoe.models.gguf.container import Block, Container

_T = TypeVar("_T", int, float, bool, str)

# Keys of any architecture with the values that leave a model as it is: written by converters,
# or by hand, where the source says nothing else.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.scale": (0,),
    "attention.sliding_window": (0,),
    "attn_logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "expert_gating_func": (0, 1),
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "expert_shared_count": (0,),
    "expert_shared_feed_forward_length": (0,),
    "expert_weights_scale": (0, 1),
    "final_logit_softcapping": (0,),
    "interleave_moe_layer_step": (0, 1),
    "leading_dense_block_count": (0,),
    "logit_scale": (0, 1),
    "nextn_predict_layers": (0,),
    "pooling_type": (0,),
    "residual_scale": (0, 1),
    "rope.scaling.yarn_ext_factor": (-1, 1),
    "router_logit_softcapping": (0,),
    "use_parallel_residual": (False,),
}
# What llama.cpp keeps for the reader; nothing computes with it.
_TOLD = ("rope.scaling.finetuned", "tensor_data_layout")


class Metadata:
    """Reads the keys of one architecture and remembers which were read.

    Attributes:
        container: The file.
        left_out: Keys that no model is computed with, by name.
    """

    def __init__(self, container: Container) -> None:
        """Begin with no key read.

        Args:
            container: The file.
        """
        self.container = container
        self._prefix = f"{container.architecture}."
        self._read: set[str] = set()
        self.left_out: list[str] = []

    def __contains__(self, key: str) -> bool:
        """Return whether the file has a key of its architecture."""
        return f"{self._prefix}{key}" in self.container.metadata

    @overload
    def take(self, key: str, kind: type[_T]) -> _T: ...
    @overload
    def take(self, key: str, kind: type[_T], default: _T) -> _T: ...
    @overload
    def take(self, key: str, kind: type[_T], default: None) -> _T | None: ...
    def take(self, key: str, kind: type[_T], default: Any = ...) -> Any:
        """Read a value.

        Args:
            key: Its key, without the architecture.
            kind: Its type; of a list with one entry per layer, the type of each.
            default: What it is where the file does not say; required by default.

        Returns:
            The value; floats as the shortest decimal number of their float32.

        Raises:
            CheckpointError: It is missing, of another type, or differs between layers.
        """
        whole = f"{self._prefix}{key}"
        self._read.add(whole)
        found = self.container.metadata.get(whole, default)
        if found is ...:
            raise CheckpointError(
                f"a GGUF of {self.container.architecture} must say {whole}, got no such key in "
                f"{self.container.path}. Convert the model again with a newer llama.cpp."
            )
        if found is None:
            return None
        if isinstance(found, list):
            # llama.cpp keeps some numbers for each layer.
            if len(set(found)) != 1:
                raise CheckpointError(
                    f"{whole} must be the same in all layers, got {found!r:.80} in "
                    f"{self.container.path}. Layers of different sizes are not supported."
                )
            found = found[0]
        if kind is float and type(found) in (int, float):
            return float(str(np.float32(found)))
        if type(found) is not kind:
            raise CheckpointError(
                f"{whole} must be of type {kind.__name__}, got {found!r:.80} in "
                f"{self.container.path}. Download the file again."
            )
        return found

    def take_list(self, key: str) -> list[Any] | None:
        """Read a list as it is.

        Args:
            key: Its key, without the architecture.

        Returns:
            The list; None where the file has none.
        """
        self._read.add(f"{self._prefix}{key}")
        found = self.container.metadata.get(f"{self._prefix}{key}")
        return found if isinstance(found, list) else None

    def expect(self, key: str, *values: object) -> None:
        """Refuse a key unless it says what the model is anyway.

        Args:
            key: Its key, without the architecture.
            *values: Values that it may have.

        Raises:
            CheckpointError: It has another value.
        """
        whole = f"{self._prefix}{key}"
        self._read.add(whole)
        found = self.container.metadata.get(whole, values[0])
        if isinstance(found, list) and len(set(found)) == 1:
            found = found[0]
        if found not in values:
            self.refuse(whole, values)

    def refuse(self, key: str, values: Sequence[object] = ()) -> None:
        """Refuse the file for what a key says.

        Args:
            key: The whole key.
            values: Values that would do.

        Raises:
            CheckpointError: Always.
        """
        may = f"{' or '.join(map(str, values))}" if values else "absent"
        raise CheckpointError(
            f"{key} must be {may}, got {self.container.metadata.get(key)!r:.80} in "
            f"{self.container.path}: edgemoe's {self.container.architecture} does not compute "
            "with it. Use the Hugging Face checkpoint that the file was made from."
        )

    def refuse_tensor(self, block: Block, rule: str) -> None:
        """Refuse a tensor.

        Args:
            block: The tensor.
            rule: What it must be.

        Raises:
            CheckpointError: Always.
        """
        raise CheckpointError(
            f"{block.name!r:.100} must be {rule}, got {block.shape} of type "
            f"{block.type_name} in {block.file}. Convert the model again."
        )

    def finish(self) -> None:
        """Refuse each key of the architecture that nothing has read.

        Raises:
            CheckpointError: There is one, and its value changes the model.
        """
        for key in self.container.metadata:
            if not key.startswith(self._prefix) or key in self._read:
                continue
            name = key.removeprefix(self._prefix)
            if name in _TOLD:
                self.left_out.append(key)
            elif name in _NEUTRAL:
                self.expect(name, *_NEUTRAL[name])
            else:
                self.refuse(key)
