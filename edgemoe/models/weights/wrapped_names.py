"""Names of a language model's tensors in a checkpoint that holds more than it.

A checkpoint that also sees or hears keeps its language model below a name of its own
(`model.language_model.layers.0...`, `language_model.model.layers.0...`), or under names of its
producer that transformers' rules for the whole model translate. Which of these a checkpoint
follows is asked of the names that it has: the reading that gives the language model most of
its tensors is the right one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    get_model_conversion_mapping,
)
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from transformers import PreTrainedModel

_DEEPEST_PREFIX = 3  # parts of a name, as in `model.language_model.model.`


@dataclass(frozen=True, kw_only=True)
class ReadingRules:
    """What turns a checkpoint's names into a language model's, in the order of trying.

    Attributes:
        outer: Renames that lead out of what the language model is a part of.
        own: The language model's own rules, which a checkpoint of it alone is written by.
        foreign: Converters of the whole that the language model alone does not have.
    """

    outer: list[Any]
    own: list[Any]
    foreign: list[Any]

    @property
    def renamings(self) -> list[Any]:
        """All renames: each chains with those after it."""
        return [*self.outer, *(rule for rule in self.own if isinstance(rule, WeightRenaming))]

    @property
    def converters(self) -> list[Any]:
        """All converters: the first that matches counts."""
        own = [rule for rule in self.own if isinstance(rule, WeightConverter)]
        return [*own, *self.foreign]

    def own_name(self, name: str) -> str:
        """Return the name that a tensor has in a checkpoint of the language model alone."""
        return str(rename_source_key(name, self.outer, [])[0])


def reading_rules(
    model: PreTrainedModel, names: Collection[str], wrapper: str | None
) -> ReadingRules:
    """Find the rules that turn a checkpoint's names into a language model's.

    Args:
        model: The language model, on the meta device.
        names: The checkpoint's tensors.
        wrapper: Model type of the checkpoint where the language model is a part of it.

    Returns:
        The rules.
    """
    if wrapper is None:
        return _join(model, None, "")
    samples = _samples(names)
    chosen, most = (False, ""), -1
    for outer in (False, True):
        renamings = _outer_rules(wrapper)[0] if outer else []
        for prefix in _prefixes(_renamed(samples, renamings)):
            # Rules remember what they matched: each try has its own.
            hits = _hits(model, samples, _join(model, wrapper if outer else None, prefix))
            if hits > most:
                chosen, most = (outer, prefix), hits
    outer, prefix = chosen
    return _join(model, wrapper if outer else None, prefix)


def _join(model: PreTrainedModel, wrapper: str | None, prefix: str) -> ReadingRules:
    renamings, converters = _outer_rules(wrapper)
    below = [WeightRenaming(f"^{re.escape(prefix)}", "")] if prefix else []
    own = get_model_conversion_mapping(model)
    return ReadingRules(outer=[*renamings, *below], own=own, foreign=converters)


def _outer_rules(wrapper: str | None) -> tuple[list[Any], list[Any]]:
    rules = (get_checkpoint_conversion_mapping(wrapper) if wrapper else None) or []
    return (
        [rule for rule in rules if isinstance(rule, WeightRenaming)],
        [rule for rule in rules if isinstance(rule, WeightConverter)],
    )


def _samples(names: Iterable[str]) -> list[str]:
    """Return one name of each kind: layers and experts differ by their numbers only."""
    return sorted({re.sub(r"\d+", "#", name): name for name in names}.values())


def _renamed(names: Iterable[str], renamings: list[Any]) -> list[str]:
    return [rename_source_key(name, renamings, [])[0] for name in names]


def _prefixes(names: Iterable[str]) -> list[str]:
    """Return what the language model may lie below, the shortest first."""
    found = {""}
    for name in names:
        parts = name.split(".")[:-1][:_DEEPEST_PREFIX]
        for end in range(1, len(parts) + 1):
            if not any(part.isdigit() for part in parts[:end]):
                found.add(".".join(parts[:end]) + ".")
    return sorted(found, key=lambda prefix: (len(prefix), prefix))


def _hits(model: PreTrainedModel, names: Sequence[str], rules: ReadingRules) -> int:
    """Count the kinds of tensors that get a place in the model."""
    expected = model.state_dict()
    renamings, converters = rules.renamings, rules.converters
    prefix = model.base_model_prefix
    found = (
        rename_source_key(name, renamings, converters, prefix, expected)[0] for name in names
    )
    return len({re.sub(r"\d+", "#", name) for name in found if name in expected})
