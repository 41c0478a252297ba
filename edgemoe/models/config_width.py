"""Where config.json says how wide routed experts are, if it says that of them alone.

Some families have an entry for the width of their routed experts. In others the same entry is
also the width of dense layers or of shared experts, and must not change with them. Which it is
is found by building the model with another value, and looking at what else changes.
"""

from __future__ import annotations

import copy
import hashlib
from typing import TYPE_CHECKING, Any

from edgemoe.models.discovery import build_skeleton, width_of
from edgemoe.models.experts import ExpertsLayout, is_experts_module
from edgemoe.models.registry import find_family

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

    from edgemoe.models.contract import MoeModel
    from edgemoe.models.registry import Family

_known: dict[tuple[str, str], tuple[str, ...]] = {}


def width_entries(model: MoeModel, widths: Sequence[int]) -> tuple[dict[str, int], bool]:
    """Return the entries of config.json that give routed experts some widths.

    Args:
        model: The model, possibly on the meta device.
        widths: Intermediate channels of the experts of each MoE layer.

    Returns:
        Entries to set: the largest width, so that stock transformers refuses narrower layers
        instead of misreading them. And whether config.json then says all there is to say.
    """
    if list(widths) == [layer.spec.width for layer in model.layers]:
        return {}, True
    entries = find_width_entries(find_family(model.config.model_type), model.config)
    return dict.fromkeys(entries, max(widths)), bool(entries) and len(set(widths)) == 1


def find_width_entries(family: Family, config: PreTrainedConfig) -> tuple[str, ...]:
    """Find the entries that say how wide routed experts are, and nothing else.

    Args:
        family: The family.
        config: Its configuration.

    Returns:
        Their names, to be changed together; none where there is no such entry.
    """
    text = config.to_json_string(use_diff=False)
    key = (family.causal_lm.__name__, hashlib.sha256(text.encode()).hexdigest())
    if key not in _known:
        _known[key] = _find(family, config)
    return _known[key]


def _find(family: Family, config: PreTrainedConfig) -> tuple[str, ...]:
    skeleton = build_skeleton(family, config)
    widths = {width_of(module) for module in _experts_modules(skeleton).values()}
    if len(widths) > 1:
        return ()
    (width,) = widths
    named = [
        name
        for name, value in config.to_dict().items()
        if type(value) is int and value == width
    ]
    # Some families repeat a number, and want all of its entries changed together.
    for chosen in (*((name,) for name in named), tuple(named)):
        if chosen and _changes_experts_alone(family, config, chosen, skeleton, width):
            return chosen
    return ()


def _changes_experts_alone(
    family: Family,
    config: PreTrainedConfig,
    entries: tuple[str, ...],
    before: PreTrainedModel,
    width: int,
) -> bool:
    changed = copy.deepcopy(config)
    try:
        for entry in entries:
            setattr(changed, entry, 2 * width)
        after = _shapes(build_skeleton(family, changed))
    except Exception:  # whatever a family raises where an entry means something else
        return False
    expected = _shapes(before)
    for prefix, module in _experts_modules(before).items():
        layout = ExpertsLayout.of(module)
        for name in layout.names:
            axis = layout.width_axis(name)
            if axis is not None:
                shape = list(expected[f"{prefix}.{name}"])
                shape[axis] *= 2
                expected[f"{prefix}.{name}"] = tuple(shape)
    return after == expected


def _experts_modules(model: torch.nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if is_experts_module(module)}


def _shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    named = (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    )
    return {name: tuple(tensor.shape) for name, tensor in named}
