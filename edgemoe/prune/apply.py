"""Carry out a plan on a model: router rows, correction bias and experts move in lockstep."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from edgemoe.models.saving import set_expert_counts
from edgemoe.progress import track
from edgemoe.prune.merge import average, merge_experts

if TYPE_CHECKING:
    from edgemoe.models.contract import MoeLayer, MoeModel
    from edgemoe.prune.plan import LayerPlan, MergedExpert, Plan


@torch.no_grad()
def apply_plan(model: MoeModel, plan: Plan) -> MoeModel:
    """Keep and merge experts as planned, layer by layer, in place.

    A kept expert's tensors are copied bit for bit. A merged expert is the weighted average of
    its aligned members, and its router row is the weighted average of their rows: a start that
    a router trained afterwards improves on, and that needs no data.

    Args:
        model: The model; it is changed and must not be used as the original any more.
        plan: The decision.

    Returns:
        The compressed model, whose ``path`` is None because no checkpoint equals it yet.

    Raises:
        PlanError: The plan does not fit the model; then nothing has changed.
    """
    plan.validate(model.shape)
    sha256 = model.sha256
    plan.validate(model.shape, sha256)
    pairs = list(zip(model.layers, plan.layers, strict=True))
    for layer, layer_plan in track(pairs, "Applying the plan"):
        if not keeps_all(layer_plan, layer.num_experts):
            apply_layer(layer, layer_plan)
    set_expert_counts(model)
    return replace(model, path=None, provenance=describe_plan(plan, model, sha256))


def describe_plan(plan: Plan, model: MoeModel, checkpoint_sha256: str) -> dict[str, Any]:
    """Say how a compressed checkpoint was made.

    Args:
        plan: The plan that was applied.
        model: The model that it was applied to.
        checkpoint_sha256: That model's fingerprint.

    Returns:
        JSON values, for the checkpoint's note.
    """
    return {
        "plan_sha256": plan.sha256,
        "method": plan.method,
        "options": dict(sorted(plan.options.items())),
        "seed": plan.seed,
        "task": plan.task,
        "checkpoint_sha256": checkpoint_sha256,
        "statistics_sha256": plan.statistics_sha256,
        "edgemoe_version": plan.edgemoe_version,
        # What was done before, where the checkpoint had been compressed already.
        "before": None if model.provenance is None else dict(model.provenance),
    }


def keeps_all(plan: LayerPlan, num_experts: int) -> bool:
    """Ask whether a plan leaves a layer as it is.

    Args:
        plan: The layer's plan.
        num_experts: Experts that the layer has.

    Returns:
        Whether nothing would change.
    """
    return not plan.is_merging and len(plan.experts) == num_experts


def apply_layer(layer: MoeLayer, plan: LayerPlan) -> None:
    """Carry out a plan on one layer, in place; averages are float32 before they are cast.

    Args:
        layer: The layer.
        plan: Its plan, which was validated.
    """
    gate_up, down = zip(*(_expert(layer, expert) for expert in plan.experts), strict=True)
    bias = layer.correction_bias
    layer.replace_experts(
        torch.stack(gate_up),
        torch.stack(down),
        torch.stack([_row(layer.router_weight, expert) for expert in plan.experts]),
        None if bias is None else torch.stack([_row(bias, expert) for expert in plan.experts]),
    )


def _expert(layer: MoeLayer, expert: MergedExpert) -> tuple[torch.Tensor, torch.Tensor]:
    if len(expert.members) == 1:
        return layer.gate_up[expert.members[0]], layer.down[expert.members[0]]
    members = list(expert.members)
    gate_up, down = merge_experts(
        layer.gate_up[members].float(),
        layer.down[members].float(),
        expert.shares,
        reference=members.index(expert.aligned_to),
    )
    return gate_up.to(layer.gate_up.dtype), down.to(layer.down.dtype)


def _row(rows: torch.Tensor, expert: MergedExpert) -> torch.Tensor:
    if len(expert.members) == 1:
        return rows[expert.members[0]]
    average_row = average([rows[member].float() for member in expert.members], expert.shares)
    return average_row.to(rows.dtype)
