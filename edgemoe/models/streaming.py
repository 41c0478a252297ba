"""A model whose decoder layers are in memory one at a time.

The skeleton is the family's own model on the meta device. What is no decoder layer (embedding,
last norm, rotary tables) is loaded once; a decoder layer's tensors are read, converted by
transformers' own rules, put in place, and given back when the block ends. Peak memory is the
part that is loaded once, plus one layer, plus what converting its largest group takes: less
than a second layer.
"""

from __future__ import annotations

import contextlib
import copy
import re
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
from torch import nn

from edgemoe.errors import CheckpointError, StreamingError
from edgemoe.models.decoder import find_layers
from edgemoe.models.loading import refuse_not_finite
from edgemoe.models.transformers_internals import (
    compute_unstored,
    dtype_plan,
    mark_initialised,
    move_from_meta,
    optional_patterns,
)
from edgemoe.models.weights.conversion import Conversion
from edgemoe.models.weights.tensor_files import list_tensors

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence
    from pathlib import Path

    from transformers import PreTrainedConfig, PreTrainedModel

    from edgemoe.models.weights.conversion import TensorGroup

# Modules, names of their tensors, and what was there before.
_Places: TypeAlias = "list[tuple[nn.Module, str, torch.Tensor]]"


class Skeleton:
    """A model on the meta device, over the checkpoint that its tensors come from.

    Attributes:
        model: The model, in eval mode, without gradients.
        decoder: Its part that turns token ids into hidden states.
        layers: Its decoder layers.
        device: Where tensors are held.
        conversion: How the checkpoint's tensors become the model's.
        groups: Groups of tensors by decoder layer; under None those of no decoder layer.
    """

    def __init__(
        self,
        model_class: type[Any],
        config: PreTrainedConfig,
        files: Sequence[Path],
        dtype: torch.dtype,
        device: str = "cpu",
        wrapper: str | None = None,
    ) -> None:
        """Build the model and match it with a checkpoint's headers; no weight is read.

        Args:
            model_class: The family's class of language models.
            config: The checkpoint's configuration.
            files: Its weight files.
            dtype: Floating type to hold weights in.
            device: Where to hold them.
            wrapper: Model type of the checkpoint where the language model is a part of it.

        Raises:
            CheckpointError: Tensors are missing, or have another shape than the
                configuration says.
            StreamingError: The family's layers cannot be loaded one by one.
        """
        self.model: PreTrainedModel = _build(model_class, config, dtype)
        self.decoder, self.layers, self._prefix = find_layers(self.model)
        self._types = _wanted_types(self.model, dtype)
        self.device = device
        self._refuse_shared_layers()
        stored = list_tensors(files)
        try:
            self.conversion = Conversion(self.model, stored, wrapper)
        except (RuntimeError, ValueError, IndexError) as error:
            raise CheckpointError(
                f"the weights in {files[0].parent} must fit its config.json, got tensors that "
                f"do not fit together: {error}. Copy the checkpoint again."
            ) from error
        self.groups: dict[int | None, list[TensorGroup]] = {None: []}
        for index in range(len(self.layers)):
            self.groups[index] = []
        for group in self.conversion.groups:
            self.groups[self._layer_of(group)].append(group)
        self._absent = set(self._types).difference(*(g.targets for g in self.conversion.groups))
        self._make_unstored(self._check_fit(files[0].parent))

    @property
    def stored_dtype(self) -> torch.dtype:
        """Floating type that most of the checkpoint's bytes are stored in."""
        sizes: dict[torch.dtype, int] = {torch.float32: 0}
        for group in self.conversion.groups:
            for source, _ in group.sources:
                if source.dtype.is_floating_point:
                    sizes[source.dtype] = sizes.get(source.dtype, 0) + source.nbytes
        return max(sizes, key=sizes.__getitem__)

    def extent_of(self, index: int | None) -> dict[Path, int]:
        """Return the end of a decoder layer's bytes in each file that it reaches into.

        Args:
            index: The layer; None stands for what belongs to no layer.

        Returns:
            For each file that it is read from the end of its last tensor there, in bytes.
        """
        ends: dict[Path, int] = {}
        for group in self.groups[index]:
            for source, _ in group.sources:
                for file, end in source.extents():
                    ends[file] = max(end, ends.get(file, 0))
        return ends

    def load_outer(self) -> None:
        """Load what the decoder needs besides its layers; the head only where it is tied."""
        inside = {id(tensor) for tensor in self.decoder.state_dict(keep_vars=True).values()}
        everything = self.model.state_dict(keep_vars=True)
        wanted = {name for name, tensor in everything.items() if id(tensor) in inside}
        ties = dict(self.model.all_tied_weights_keys)
        for pair in ties.items():
            if wanted.intersection(pair):
                wanted.update(pair)
        for group in self.groups[None]:
            if wanted.intersection(group.targets):
                for target, tensor in self.conversion.read(group):
                    placed = tensor.to(self.device, self._types[target])
                    self._place(target, placed, [])
        if any(wanted.intersection(pair) for pair in ties.items()):
            self.model.tie_weights(missing_keys=set(self._absent), recompute_mapping=False)

    def load_all(self) -> None:
        """Load the whole model, for good."""
        for group in self.conversion.groups:
            for target, tensor in self.conversion.read(group):
                self._place(target, tensor.to(self.device, self._types[target]), [])
        self.model.tie_weights(missing_keys=set(self._absent), recompute_mapping=False)

    @contextlib.contextmanager
    def outer(self) -> Iterator[None]:
        """Hold in memory what the decoder needs besides its layers.

        Yields:
            Nothing. When the block ends it is on the meta device again.
        """
        with self._keeping_outer():
            self.load_outer()
            yield

    @contextlib.contextmanager
    def head(self) -> Iterator[None]:
        """Hold in memory what follows the decoder, in a block of `outer`.

        Yields:
            Nothing. When the block ends it is on the meta device again.
        """
        with self._keeping_outer():
            for group in self.groups[None]:
                present = self.model.state_dict(keep_vars=True)
                if any(present[target].is_meta for target in group.targets):
                    for target, tensor in self.conversion.read(group):
                        self._place(target, tensor.to(self.device, self._types[target]), [])
            yield

    @contextlib.contextmanager
    def _keeping_outer(self) -> Iterator[None]:
        tables = [
            (table, dict(table))
            for name, module in self.model.named_modules()
            if not name.startswith(f"{self._prefix}.")
            for table in (module._parameters, module._buffers)
        ]
        try:
            yield
        finally:
            for table, before in tables:
                cast("Any", table).update(before)

    def read(self, target: str) -> torch.Tensor:
        """Read one tensor without putting it in place.

        Args:
            target: Its name in the model.

        Returns:
            Its contents in the type to hold it in.
        """
        stored = self._stored_name(target)
        for group in self.groups[_index(target, self._prefix)]:
            if stored in group.targets:
                found = dict(self.conversion.read(group))
                return found[stored].to(self._types[target])
        path, _, name = target.rpartition(".")
        # What no checkpoint holds was computed when the skeleton was made.
        tensor: torch.Tensor = _table(self.model.get_submodule(path), name)[name]
        return tensor.detach()

    def _stored_name(self, target: str) -> str:
        """Return the name of the two that tied tensors have which the checkpoint knows."""
        for pair in self.model.all_tied_weights_keys.items():
            if target in pair and target in self._absent:
                return str(next(name for name in pair if name != target))
        return target

    @contextlib.contextmanager
    def layer(
        self,
        index: int,
        *,
        only: Collection[str] | None = None,
        as_stored: bool = False,
        in_float32: Collection[str] = (),
    ) -> Iterator[nn.Module]:
        """Hold one decoder layer in memory.

        Args:
            index: Which.
            only: First targets of the groups to load; all by default.
            as_stored: Whether tensors keep the type that they are stored in.
            in_float32: Tensors that do not even so.

        Yields:
            The layer. When the block ends its tensors are on the meta device again.

        Raises:
            CheckpointError: A file became shorter.
        """
        with self._restoring() as places:
            for group in self.groups[index]:
                if only is None or group.first_target in only:
                    for target, tensor in self.conversion.read(group):
                        dtype = self._dtype(target, tensor, as_stored, in_float32)
                        self._place(target, tensor.to(self.device, dtype), places)
            yield self.layers[index]

    @contextlib.contextmanager
    def layer_on_meta(
        self, index: int, *, in_float32: Collection[str] = ()
    ) -> Iterator[nn.Module]:
        """Put a decoder layer on the meta device to be reshaped; restore it after the block.

        Args:
            index: Which.
            in_float32: As in `layer`.

        Yields:
            The layer, its tensors in the types that they are stored in, without contents.
        """
        with self._restoring() as places:
            for group in self.groups[index]:
                for target, tensor in group.targets.items():
                    dtype = self._dtype(target, tensor, True, in_float32)
                    self._place(target, torch.empty_like(tensor, dtype=dtype), places)
            yield self.layers[index]

    @contextlib.contextmanager
    def _restoring(self) -> Iterator[_Places]:
        places: _Places = []
        try:
            yield places
        finally:
            for module, name, meta in places:
                _table(module, name)[name] = meta

    def _dtype(
        self, target: str, tensor: torch.Tensor, as_stored: bool, in_float32: Collection[str]
    ) -> torch.dtype:
        if not as_stored:
            return self._types[target]
        return torch.float32 if target in in_float32 else tensor.dtype

    def layer_tensors(self, index: int) -> dict[str, torch.Tensor]:
        """Return a decoder layer's tensors as they are now.

        Args:
            index: Which.

        Returns:
            Parameters and buffers themselves, by their names in the model.
        """
        found = self.layers[index].state_dict(keep_vars=True)
        return {f"{self._prefix}.{index}.{name}": tensor for name, tensor in found.items()}

    def _place(
        self,
        target: str,
        tensor: torch.Tensor,
        places: _Places,
    ) -> None:
        path, _, name = target.rpartition(".")
        module = self.model.get_submodule(path)
        table = _table(module, name)
        refuse_not_finite(target, tensor)
        places.append((module, name, table[name]))
        is_parameter = table is module._parameters
        new = nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor
        # Whoever initialises what was not loaded must pass this one by.
        mark_initialised(new)
        table[name] = new

    def _layer_of(self, group: TensorGroup) -> int | None:
        found = {_index(target, self._prefix) for target in group.targets}
        if len(found) != 1:
            raise StreamingError(
                "each tensor of a checkpoint must belong to one decoder layer, got "
                f"{group.sources[0][0].name} for layers {sorted(map(str, found))}."
            )
        return found.pop()

    def _refuse_shared_layers(self) -> None:
        owners: dict[int, set[int | None]] = {}
        named = self.model.named_parameters(remove_duplicate=False)
        for name, parameter in named:
            owners.setdefault(id(parameter), set()).add(_index(name, self._prefix))
        ties = self.model.all_tied_weights_keys.items()
        apart = [{_index(one, self._prefix), _index(two, self._prefix)} for one, two in ties]
        if any(len(layers) > 1 for layers in (*owners.values(), *apart)):
            raise StreamingError(
                f"decoder layers must not share weights, got {type(self.model).__name__}, "
                "whose layers do."
            )

    def _check_fit(self, path: Path) -> set[str]:
        """Refuse what `load_model` would; return what a checkpoint may lack and this does."""
        expected = self.model.state_dict()
        found = {k: v for group in self.conversion.groups for k, v in group.targets.items()}
        misshapen = {
            k for k, v in found.items() if k in expected and v.shape != expected[k].shape
        }
        missing = set(self._absent)
        self.model.tie_weights(missing_keys=missing, recompute_mapping=False)
        rules = optional_patterns(self.model)
        optional = {k for k in missing if any(re.search(rule, k) for rule in rules)}
        unfit = sorted((missing - optional) | misshapen)
        if unfit:
            raise CheckpointError(
                f"the weights in {path} must fit its config.json, got {len(unfit)} tensors "
                f"missing or of another shape, such as {unfit[0]}. Copy the checkpoint again."
            )
        return optional

    def _make_unstored(self, optional: set[str]) -> None:
        """Compute what no checkpoint holds, such as rotary tables, as transformers does."""
        for tensor in self.model.state_dict(keep_vars=True).values():
            mark_initialised(tensor)
        move_from_meta(self.model, optional, self.device)
        with torch.no_grad():
            compute_unstored(self.model)
        self.model.eval()
        self.model.requires_grad_(False)


def _build(model_class: type[Any], config: PreTrainedConfig, dtype: torch.dtype) -> Any:
    config = copy.deepcopy(config)
    config.dtype = dtype
    with contextlib.ExitStack() as stack:
        for context in model_class.get_init_context(dtype, False, False, None):
            stack.enter_context(context)
        model = model_class(config)
    return model


def _wanted_types(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Return each tensor's type in memory: some families keep some tensors in float32."""
    plan = dtype_plan(model, dtype)
    return {
        name: next(
            (kept for part, kept in plan.items() if re.search(part.replace("*", ".*"), name)),
            tensor.dtype,
        )
        for name, tensor in model.state_dict().items()
    }


def _table(module: nn.Module, name: str) -> dict[str, Any]:
    return module._parameters if name in module._parameters else module._buffers


def _index(name: str, prefix: str) -> int | None:
    if not name.startswith(f"{prefix}."):
        return None
    number = name[len(prefix) + 1 :].split(".", 1)[0]
    return int(number)
