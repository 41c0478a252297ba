"""Which stored tensors make which tensors of a model: asked of transformers' own rules.

A checkpoint on the hub keeps experts one by one (`mlp.experts.3.gate_proj.weight`), and
transformers stacks them. Its rules are regular expressions and operations over the tensors that
they match. Here they run on any part of a checkpoint, on contents or on shapes alone, and back
again; `transformers.core_model_loading.convert_and_load_state_dict_in_model` is the same
loop over a whole checkpoint.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from edgemoe.models.stored_tensors import read_together
from edgemoe.models.transformers_internals import set_saving_rules
from edgemoe.models.weights.wrapped_names import ReadingRules, reading_rules

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch
    from transformers import PreTrainedModel

    from edgemoe.models.stored_tensors import StoredTensor


@dataclass(kw_only=True)
class TensorGroup:
    """Stored tensors that one rule turns into tensors of a model together.

    Attributes:
        first_target: Name that the rule gives to all of them.
        rule: The rule; a rename where it is no converter.
        sources: The stored tensors, each with the pattern of the rule that it matches, in the
            order in which the rule takes them.
        targets: Names and types of the model's tensors that they become, with their shapes.
        names: What the stored tensors are called in a checkpoint of the model alone.
        is_foreign: Whether a checkpoint of the model alone cannot hold them as they are stored.
    """

    first_target: str
    rule: WeightRenaming | WeightConverter
    sources: list[tuple[StoredTensor, str]] = field(default_factory=list)
    targets: dict[str, torch.Tensor] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    is_foreign: bool = False

    @property
    def nbytes(self) -> int:
        """Stored size in bytes."""
        return sum(source.nbytes for source, _ in self.sources)


class Conversion:
    """The way between a checkpoint's tensors and a model's.

    Attributes:
        groups: All groups, by the order of their stored names.
        unexpected: Stored tensors that the model has no place for, and the names that they
            would have in it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        stored: Mapping[str, StoredTensor],
        wrapper: str | None = None,
    ) -> None:
        """Match every stored tensor.

        Args:
            model: The model, on the meta device; it is told which rules it was loaded by, so
                that `revert` writes the same layout.
            stored: The checkpoint's tensors.
            wrapper: Model type of the checkpoint where the model is a part of it; `revert`
                writes the layout of the part alone.

        Raises:
            ValueError: Tensors that one rule would join do not fit together, or two have one
                place.
        """
        self._model = model
        self.groups: list[TensorGroup] = []
        self.unexpected: list[tuple[StoredTensor, str]] = []
        rules = reading_rules(model, stored, wrapper)
        self._match(rules, stored)
        # What save_pretrained would read: the rules that matched, in their order.
        self.used_rules = [rule for rule in rules.own if rule.was_used()]
        set_saving_rules(model, self.used_rules)
        for group in self.groups:
            shapes = [source.on_meta() for source, _ in group.sources]
            group.targets = dict(self._convert(group, shapes))

    def stored_types(self) -> dict[str, torch.dtype]:
        """Return the floating types that the model's tensors are stored in.

        Returns:
            Types by name in the model; where a rule computes a tensor from several types, that
            of what it computes.
        """
        found = {}
        for group in self.groups:
            sources = {source.dtype for source, _ in group.sources}
            for name, tensor in group.targets.items():
                if tensor.dtype.is_floating_point:
                    found[name] = next(iter(sources)) if len(sources) == 1 else tensor.dtype
        return found

    def _match(self, rules: ReadingRules, stored: Mapping[str, StoredTensor]) -> None:
        expected = self._model.state_dict()
        prefix = self._model.base_model_prefix
        renamings, converters = rules.renamings, rules.converters
        # Of two converters for a pattern the first is the one that matches.
        by_pattern = {
            pattern: converter
            for converter in reversed(converters)
            for pattern in converter.source_patterns
        }
        groups: dict[str, TensorGroup] = {}
        for name in sorted(stored, key=dot_natural_key):
            target, pattern = rename_source_key(name, renamings, converters, prefix, expected)
            if target not in expected and name in expected:
                target, pattern = rename_source_key(name, [], [], prefix, expected)
            if target not in expected:
                self.unexpected.append((stored[name], target))
                continue
            if target not in groups:
                rule = WeightRenaming(name, target) if pattern is None else by_pattern[pattern]
                is_foreign = any(rule is other for other in rules.foreign)
                groups[target] = TensorGroup(
                    first_target=target, rule=rule, is_foreign=is_foreign
                )
            elif pattern is None or not isinstance(groups[target].rule, WeightConverter):
                # transformers 5.24 takes one of them in silence.
                first = groups[target].sources[0][0].name
                raise ValueError(f"{first} and {name} both stand for {target}")
            groups[target].sources.append((stored[name], pattern or name))
            groups[target].names.append(rules.own_name(name))
        self.groups = list(groups.values())

    def read(self, group: TensorGroup) -> Iterator[tuple[str, torch.Tensor]]:
        """Read a group's tensors and convert them, in the types that they are stored in.

        Args:
            group: One of `groups`.

        Yields:
            Names of the model's tensors, and their contents.
        """
        yield from self._convert(group, read_together([source for source, _ in group.sources]))

    def revert(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Turn tensors of the model into the checkpoint's own layout.

        Args:
            tensors: All the tensors of one or more groups, possibly on the meta device.

        Returns:
            Tensors by the names that `save_pretrained` would give them.
        """
        cast("Any", self._model)._weight_conversions = self.used_rules
        reverted: dict[str, torch.Tensor] = revert_weight_conversion(self._model, dict(tensors))
        return reverted

    def _convert(
        self, group: TensorGroup, contents: list[torch.Tensor]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        rule = deepcopy(group.rule)
        for (source, pattern), content in zip(group.sources, contents, strict=True):
            rule.add_tensor(group.first_target, source.name, pattern, cast("Any", content))
        # The rule lets go of what it has used.
        contents.clear()
        del content
        values = rule.convert(group.first_target, model=self._model, config=self._model.config)
        for name in list(values):
            value = values.pop(name)
            yield name, value[0] if isinstance(value, list) else value
