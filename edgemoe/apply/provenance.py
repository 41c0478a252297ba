"""How a compressed checkpoint was made, for the note that it carries."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgemoe.models.contract import MoeModel
    from edgemoe.plans.plan import Plan


def list_kept(plan: Plan) -> list[list[int | list[int]]]:
    """List which experts a plan keeps, in the order of the compressed checkpoint.

    Args:
        plan: The plan.

    Returns:
        For each MoE layer an id for each kept expert, and the ids of its members for each
        merged one.
    """
    return [
        [
            expert.members[0] if len(expert.members) == 1 else list(expert.members)
            for expert in layer.experts
        ]
        for layer in plan.layers
    ]


def describe_plan(plan: Plan, model: MoeModel, checkpoint_sha256: str) -> dict[str, Any]:
    """Say how a compressed checkpoint was made.

    Args:
        plan: The plan that was applied.
        model: The model that it was applied to.
        checkpoint_sha256: That model's fingerprint.

    Returns:
        JSON values, for the checkpoint's note.
    """
    found = {
        "plan_sha256": plan.sha256,
        "method": plan.method,
        "options": dict(sorted(plan.options.items())),
        "seed": plan.seed,
        "task": plan.task,
        "checkpoint_sha256": checkpoint_sha256,
        "statistics_sha256": plan.statistics_sha256,
        "edgemoe_version": plan.edgemoe_version,
        "calibration_lines": plan.calibration_lines,
        # What was done before, where the checkpoint had been compressed already.
        "before": None if model.provenance is None else dict(model.provenance),
    }
    kept = list_kept(plan)
    if kept != [list(range(count)) for count in model.experts_per_layer]:
        found["experts"] = kept
    if plan.factors is not None:
        found["factors"] = plan.factors.describe()
    if plan.k_policy is not None:
        found["k_policy"] = plan.k_policy.describe()
    return found
