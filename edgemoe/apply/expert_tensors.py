"""The tensors of a layer's planned experts: router rows, biases and experts in lockstep."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING

import torch

from edgemoe.apply.merge import average, merge_experts
from edgemoe.errors import PlanError
from edgemoe.plans.channels import read_mask
from edgemoe.plans.layer_plan import stored_width

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from edgemoe.models.layers.layer import MoeLayer
    from edgemoe.plans.plan import LayerPlan, MergedExpert


def applied_layer(layer: MoeLayer, plan: LayerPlan) -> contextlib.AbstractContextManager[None]:
    """Carry out a plan on one layer for a while.

    Args:
        layer: The layer.
        plan: Its plan, which was validated.

    Returns:
        A context; when it ends the layer is as it was.
    """
    if keeps_all(plan, layer.num_experts):
        return contextlib.nullcontext()
    with torch.no_grad():
        return layer.changed(plan_tensors(layer, plan))


def planned_tensors(layer: MoeLayer, plan: LayerPlan) -> dict[str, torch.Tensor] | None:
    """Make the tensors of a layer's planned experts, where they are not those that it has.

    Args:
        layer: The layer; it is not changed.
        plan: What it shall keep and merge.

    Returns:
        What `edgemoe.models.layers.layer.MoeLayer.replace` takes; None where it keeps all.
    """
    return None if keeps_all(plan, layer.num_experts) else plan_tensors(layer, plan)


def keeps_all(plan: LayerPlan, num_experts: int) -> bool:
    """Ask whether a plan leaves a layer's experts as they are, but for their ranks.

    Args:
        plan: The layer's plan.
        num_experts: Experts that the layer has.

    Returns:
        Whether nothing would change.
    """
    return not plan.is_merging and not plan.prunes_width and len(plan.experts) == num_experts


def apply_layer(layer: MoeLayer, plan: LayerPlan) -> None:
    """Carry out a plan on one layer, in place.

    Args:
        layer: The layer.
        plan: Its plan, which was validated.
    """
    layer.replace(plan_tensors(layer, plan))


def plan_tensors(layer: MoeLayer, plan: LayerPlan) -> dict[str, torch.Tensor]:
    """Make the tensors of a layer's planned experts; averages are float32 before the cast.

    Args:
        layer: The layer; it is not changed.
        plan: What it shall keep and merge.

    Returns:
        What `edgemoe.models.layers.layer.MoeLayer.replace` takes.
    """
    return expert_tensors(layer, plan.experts)


def expert_tensors(
    layer: MoeLayer, experts: Sequence[MergedExpert], names: Collection[str] | None = None
) -> dict[str, torch.Tensor]:
    """Make the tensors of experts that are kept, narrowed and merged, in any order.

    Args:
        layer: The layer; it is not changed.
        experts: The experts.
        names: Which of `spec.tensors` to make; all by default. Of the experts module all or
            none are asked for where experts are merged.

    Returns:
        What `edgemoe.models.layers.layer.MoeLayer.replace` takes.
    """
    groups = tuple(expert.members for expert in experts)
    prefix = f"{layer.spec.experts}."
    wanted = [spec for spec in layer.spec.tensors if names is None or spec.name in names]
    merged = {
        position: _merge(layer, expert)
        for position, expert in enumerate(experts)
        if len(expert.members) > 1 and any(spec.name.startswith(prefix) for spec in wanted)
    }

    size = layer.intermediate_size
    prunes_width = any(expert.neurons is not None for expert in experts)
    width = stored_width(experts, size) if prunes_width else size

    def combine(name: str, entries: torch.Tensor) -> torch.Tensor:
        part = name.removeprefix(prefix) if name.startswith(prefix) else None
        made = []
        for position, expert in enumerate(experts):
            if len(expert.members) == 1:
                entry = entries[expert.members[0]]
                if expert.neurons is not None and part in layer.layout.names:
                    neurons = torch.tensor(read_mask(expert.neurons))
                    entry = layer.layout.keep_channels(part, entry, neurons, width)
                made.append(entry)
            elif part is None:
                rows = [entries[member].float() for member in expert.members]
                made.append(average(rows, expert.shares).to(entries.dtype))
            else:
                expert_part = layer.layout.to_native(part, merged[position][part])
                made.append(expert_part.to(entries.dtype))
        return torch.stack(made)

    return {
        spec.name: layer.regroup(spec, groups, partial(combine, spec.name)) for spec in wanted
    }


def _merge(layer: MoeLayer, expert: MergedExpert) -> dict[str, torch.Tensor]:
    """Merge members, in the canonical layout, by the names of the experts module."""
    if layer.is_factored:
        raise PlanError(
            f"layer {layer.index} must have whole experts to be merged, got factored ones. "
            "Merge first, then factor."
        )
    members = list(expert.members)
    experts = {
        name: layer.layout.to_canonical(
            name, layer.tensor(f"{layer.spec.experts}.{name}")[members].float()
        )
        for name in layer.layout.names
    }
    return merge_experts(experts, expert.shares, reference=members.index(expert.aligned_to))
