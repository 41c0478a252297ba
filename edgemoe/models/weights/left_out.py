"""What a checkpoint holds and its language model has no place for.

Parts that see, hear or predict further tokens are left out, and that is said. What belongs to a
part of the model that runs is refused: scales without which quantised weights are other
numbers, biases and norms that config.json does not announce, layers beyond those it counts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgemoe.errors import CheckpointError, StreamingError
from edgemoe.models.decoder import find_layers
from edgemoe.models.quantised.notes import quantised_message
from edgemoe.models.transformers_internals import needless_patterns
from edgemoe.models.weights.name_words import (
    COMPUTED,
    PREDICTING,
    PREDICTING_LAYER,
    QUANTISED,
    UNKNOWN,
    kind_by_name,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from transformers import PreTrainedModel

    from edgemoe.models.quantised.notes import QuantisationNote
    from edgemoe.models.stored_tensors import StoredTensor
    from edgemoe.models.weights.conversion import Conversion


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """Tensors of a checkpoint that are not read, of one kind.

    Attributes:
        what: In a user's words, such as `parts that see`.
        tensors: Their number.
        nbytes: Their stored size in bytes.
        example: Name of one of them.
    """

    what: str
    tensors: int
    nbytes: int
    example: str


def judge_left_out(
    model: PreTrainedModel,
    conversion: Conversion,
    path: Path,
    announced: QuantisationNote | None = None,
) -> tuple[LeftOut, ...]:
    """Tell what is left out of a checkpoint, and refuse what a model cannot be right without.

    Args:
        model: The language model, possibly on the meta device.
        conversion: How the checkpoint's tensors become the model's.
        path: The checkpoint.
        announced: What says that it is quantised.

    Returns:
        What is left out, by kind.

    Raises:
        CheckpointError: A tensor that is left out belongs to a part that runs, or weights are
            quantised and nothing has turned them into numbers.
    """
    told = "" if announced is None else f", as announced by {announced}"
    _check_types(model, conversion, path, told)
    _check_shapes(model, conversion, path)
    judge = _Judge(model, [target for _, target in conversion.unexpected], path, told)
    kinds: dict[str, list[StoredTensor]] = {}
    for tensor, target in conversion.unexpected:
        kinds.setdefault(judge.kind(tensor.name, target), []).append(tensor)
    return tuple(
        LeftOut(
            what=what,
            tensors=len(tensors),
            nbytes=sum(tensor.stored_nbytes for tensor in tensors),
            example=tensors[0].name,
        )
        for what, tensors in kinds.items()
    )


def _check_types(model: PreTrainedModel, conversion: Conversion, path: Path, told: str) -> None:
    """Refuse whole numbers and one-byte numbers where the model computes with fractions."""
    held = model.state_dict()
    for group in conversion.groups:
        if any(held[name].is_floating_point() for name in group.targets if name in held):
            for source, _ in group.sources:
                if not source.dtype.is_floating_point or source.dtype.itemsize == 1:
                    shown = str(source.dtype).removeprefix("torch.")
                    got = f"{source.name} stored as {shown}{told}"
                    raise CheckpointError(quantised_message(path, got))


def _check_shapes(model: PreTrainedModel, conversion: Conversion, path: Path) -> None:
    held = model.state_dict()
    unfit = {
        name: (tuple(tensor.shape), tuple(held[name].shape))
        for group in conversion.groups
        for name, tensor in group.targets.items()
        if name in held and tensor.shape != held[name].shape
    }
    if unfit:
        name, (found, wanted) = min(unfit.items())
        raise CheckpointError(
            f"the weights in {path} must fit its config.json, got {len(unfit)} tensors missing "
            f"or of another shape, such as {name}, which is {list(found)} in the file and "
            f"{list(wanted)} by config.json. Correct config.json, or copy the checkpoint again."
        )


class _Judge:
    """Knows a model's parts, and says to which of them a name would belong."""

    def __init__(
        self, model: PreTrainedModel, unexpected: Sequence[str], path: Path, told: str
    ) -> None:
        self._modules = dict(model.named_modules())
        self._stem, self._count = _layers_of(model)
        self._needless = [re.compile(rule) for rule in needless_patterns(model)]
        self._path, self._told = path, told
        layers = (self._layer_of(target) for target in unexpected)
        beyond = {number for number, _ in layers if number >= self._count}
        self._predicting = {
            number
            for number in beyond
            # Such a layer joins two inputs: that config.json announces one proves nothing.
            if any(
                PREDICTING_LAYER.search(target)
                for target in unexpected
                if target.startswith(f"{self._stem}.{number}.")
            )
        }

    def kind(self, name: str, target: str) -> str:
        """Name the kind of a tensor that is left out; refuse one that must not be."""
        number, _ = self._layer_of(target)
        if number >= self._count:
            if number not in self._predicting and not self._is_needless(target):
                raise CheckpointError(
                    f"the weights in {self._path} must fit its config.json, which says "
                    f"{self._count} layers, got {name} of a further one. Correct "
                    "num_hidden_layers, or copy the checkpoint again."
                )
            return PREDICTING
        parent, _, leaf = target.rpartition(".")
        owner = self._modules.get(parent)
        if leaf.endswith("inv_freq") or (
            owner is not None and leaf in dict(owner.named_buffers())
        ):
            return COMPUTED
        kind = kind_by_name(name)
        if number < 0 and kind is not None:
            return kind
        runs = number >= 0 or (
            owner is not None and parent and any(True for _ in owner.parameters(recurse=False))
        )
        if runs and not self._is_needless(target):
            raise CheckpointError(self._misplaced(name, target))
        return UNKNOWN

    def _misplaced(self, name: str, target: str) -> str:
        if QUANTISED.search(target):
            got = f"{name}, which goes with quantised weights{self._told}"
            return quantised_message(self._path, got)
        return (
            f"the weights in {self._path} must fit its config.json, got {name}, which the "
            "model that it describes has no place for and would be wrong without. Correct the "
            "entry of config.json that leaves it out, or copy the checkpoint again."
        )

    def _layer_of(self, target: str) -> tuple[int, str]:
        """Return the decoder layer of a name, -1 for none, and the name in that layer."""
        if self._stem is None or not target.startswith(f"{self._stem}."):
            return -1, target
        number, _, rest = target[len(self._stem) + 1 :].partition(".")
        return (int(number), rest) if number.isdecimal() else (-1, target)

    def _is_needless(self, target: str) -> bool:
        return any(rule.search(target) for rule in self._needless)


def _layers_of(model: PreTrainedModel) -> tuple[str | None, int]:
    try:
        _, layers, stem = find_layers(model)
    except StreamingError:
        return None, 0
    return stem, len(layers)
