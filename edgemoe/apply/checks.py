"""What a plan asks of a model that the model cannot have, refused before any weight moves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgemoe.apply.expert_tensors import keeps_all
from edgemoe.errors import PlanError
from edgemoe.models.k_policy import most_slots
from edgemoe.models.layers.factored import product_shapes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgemoe.models.contract import MoeModel
    from edgemoe.models.layers.layer import MoeLayer
    from edgemoe.plans.plan import Plan


def check_ranks(plan: Plan, layers: Sequence[MoeLayer]) -> None:
    """Refuse ranks that the layers' matrices cannot have.

    Args:
        plan: The plan, validated for the model's shape.
        layers: The model's MoE layers, possibly on the meta device.

    Raises:
        PlanError: A rank is too large, or a layer is factored already.
    """
    shares_bases = plan.factors is not None and plan.factors.shares_bases
    for layer, layer_plan in zip(layers, plan.layers, strict=True):
        if layer_plan.stored_ranks is None:
            continue
        if layer.is_factored or layer.is_based:
            raise PlanError(
                f"layer {layer.index} must have whole experts to be factored, got "
                f"{'factored ones' if layer.is_factored else 'such that share bases'}. Start "
                "from the checkpoint that they were made from."
            )
        hidden = layer.hidden_size
        shapes = [(hidden, hidden)] * 2 if shares_bases else product_shapes(layer)
        for rank, shape in zip(layer_plan.stored_ranks, shapes, strict=True):
            if rank > min(shape):
                raise PlanError(
                    f"layer {layer.index}: ranks of a matrix {shape[0]} x {shape[1]} must be "
                    f"in [1, {min(shape)}], got {rank}. Lower them."
                )


def check_width_pruning(plan: Plan, model: MoeModel) -> None:
    """Refuse to choose neurons where the layers keep them in a way that does not allow it.

    Args:
        plan: The plan, validated for the model's shape.
        model: The model, possibly on the meta device.

    Raises:
        PlanError: A layer is factored already, or its experts share a tensor with others.
    """
    for layer, layer_plan in zip(model.layers, plan.layers, strict=True):
        if layer_plan.prunes_width:
            refuse_width_pruning(layer, model.family)


def refuse_k_policy(plan: Plan, model: MoeModel) -> None:
    """Refuse k policies that a plan and a model cannot have together.

    Args:
        plan: The plan, validated for the model's shape.
        model: The model, possibly on the meta device.

    Raises:
        PlanError: The model has a k policy, and the plan changes anything; or tokens are to
            use more experts than the router finds among those that the plan keeps.
    """
    if plan.k_policy is not None or any(
        layer_plan.ranks is not None or not keeps_all(layer_plan, layer.num_experts)
        for layer, layer_plan in zip(model.layers, plan.layers, strict=True)
    ):
        refuse_changes(model)
    if plan.k_policy is None:
        return
    rules = zip(model.layers, plan.layers, plan.k_policy.rules, strict=True)
    for layer, layer_plan, rule in rules:
        most = most_slots(layer, len(layer_plan.experts))
        if rule.slots > most:
            raise PlanError(
                f"layer {layer.index}: a token must use at most {most} experts, which is what "
                f"its router can choose of the {len(layer_plan.experts)} that are kept, got "
                f"k={rule.slots}. Make the k policy again with `edgemoe allocate --plan`."
            )


def refuse_changes(model: MoeModel) -> None:
    """Refuse any plan for a model with a k policy, before one is made.

    Args:
        model: The model, possibly on the meta device.

    Raises:
        PlanError: It has a k policy.
    """
    if model.k_policy is not None:
        raise PlanError(
            "a plan must be carried out before k is allocated, got a checkpoint with the k "
            f"policy {model.k_policy.name}. Start from the checkpoint that it was made from, "
            "and give the plan to `edgemoe allocate --plan`."
        )


def refuse_width_pruning(layer: MoeLayer, family: str) -> None:
    """Refuse a layer whose experts' neurons cannot be chosen.

    Args:
        layer: The layer.
        family: Of the model.

    Raises:
        PlanError: The layer is factored, or its experts share a tensor with others.
    """
    if layer.is_factored:
        raise PlanError(
            f"layer {layer.index} must have whole experts for neurons to be chosen, got "
            "factored ones. Start from the checkpoint that they were made from."
        )
    prefix = f"{layer.spec.experts}."
    shared = [
        spec.name for spec in layer.spec.tensors if spec.name.startswith(prefix) and spec.tail
    ]
    if shared:
        raise PlanError(
            f"routed experts must have tensors of their own for neurons to be chosen, got "
            f"{family}, where {shared[0]} also holds experts that every token uses. Choose "
            "experts instead: frequency, reap and others do."
        )
