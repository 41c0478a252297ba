"""How a compressed checkpoint was made, for the note that it carries."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgemoe.models.contract import MoeModel
    from edgemoe.plans.plan import Plan


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
    if plan.factors is not None:
        found["factors"] = plan.factors.describe()
    if plan.k_policy is not None:
        found["k_policy"] = plan.k_policy.describe()
    return found
