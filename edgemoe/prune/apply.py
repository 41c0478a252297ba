"""Carry out a plan on a model: router rows, correction bias and experts move in lockstep.

Experts are kept and merged first; what is left is factored, where the plan has ranks.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from edgemoe.decompose.registry import find_method
from edgemoe.decompose.walk import FactoringWalk
from edgemoe.errors import PlanError
from edgemoe.models.checkpoint import quiet_transformers
from edgemoe.models.factored import product_shapes
from edgemoe.models.k_policy import following, put_k_policy
from edgemoe.models.saving import set_expert_counts
from edgemoe.oracle.homes import MemoryHome
from edgemoe.plans.layer_plan import stored_width
from edgemoe.plans.neurons import read_mask
from edgemoe.progress import counting, track
from edgemoe.prune.merge import average, merge_experts

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from edgemoe.models.contract import MoeModel
    from edgemoe.models.layer import MoeLayer
    from edgemoe.models.replay import Outputs
    from edgemoe.plans.plan import LayerPlan, MergedExpert, Plan


@torch.no_grad()
def apply_plan(model: MoeModel, plan: Plan) -> MoeModel:
    """Keep and merge experts as planned, layer by layer, in place.

    A kept expert's tensors are copied bit for bit. A merged expert is the weighted average of
    its aligned members, and its router row is the weighted average of their rows: a start that
    a router trained afterwards improves on, and that needs no data. With ranks, each layer is
    factored on what the factored layers before it return for the plan's tokens.

    Args:
        model: The model; it is changed and must not be used as the original any more.
        plan: The decision.

    Returns:
        The compressed model, whose ``path`` is None because no checkpoint equals it yet.

    Raises:
        PlanError: The plan does not fit the model; then nothing has changed.
        StreamingError: The plan's method runs layers one by one, which the family's cannot; the
            model is of no use then.
    """
    plan.validate(model.shape)
    check_ranks(plan, model.layers)
    sha256 = model.sha256
    plan.validate(model.shape, sha256)
    check_neurons(plan, model)
    refuse_k_policy(plan, model)
    if plan.factors is not None:
        _factor(model, plan)
    pairs = list(zip(model.layers, plan.layers, strict=True))
    for layer, layer_plan in track(pairs, "Applying the plan"):
        if layer_plan.ranks is None and not keeps_all(layer_plan, layer.num_experts):
            apply_layer(layer, layer_plan)
    set_expert_counts(model)
    found = replace(model, path=None, provenance=describe_plan(plan, model, sha256))
    put_k_policy(found, plan.k_policy)
    return found


@contextlib.contextmanager
def applied(model: MoeModel, plan: Plan) -> Iterator[None]:
    """Carry out a plan for a while, as :func:`apply_plan` does for good.

    Args:
        model: The model; the experts that are kept are in memory twice meanwhile.
        plan: The decision; that it is about this checkpoint is for the caller to know.

    Yields:
        Nothing. When the block ends the model is as it was.

    Raises:
        PlanError: The plan does not fit the model; then nothing has changed.
    """
    plan.validate(model.shape)
    check_neurons(plan, model)
    with contextlib.ExitStack() as stack:
        for layer, layer_plan in zip(model.layers, plan.layers, strict=True):
            stack.enter_context(applied_layer(layer, layer_plan))
        if plan.k_policy is not None:
            stack.enter_context(following(model, plan.k_policy))
        yield


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


def check_neurons(plan: Plan, model: MoeModel) -> None:
    """Refuse to choose neurons where the layers keep them in a way that does not allow it.

    Args:
        plan: The plan, validated for the model's shape.
        model: The model, possibly on the meta device.

    Raises:
        PlanError: A layer is factored already, or its experts share a tensor with others.
    """
    for layer, layer_plan in zip(model.layers, plan.layers, strict=True):
        if layer_plan.is_narrowing:
            refuse_neurons(layer, model.family)


def refuse_k_policy(plan: Plan, model: MoeModel) -> None:
    """Refuse to change the experts of a model whose tokens are shared out among these.

    Args:
        plan: The plan, validated for the model's shape.
        model: The model, possibly on the meta device.

    Raises:
        PlanError: The model has a k policy, and the plan changes anything.
    """
    if plan.k_policy is not None or any(
        layer_plan.ranks is not None or not keeps_all(layer_plan, layer.num_experts)
        for layer, layer_plan in zip(model.layers, plan.layers, strict=True)
    ):
        refuse_changes(model)


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


def refuse_neurons(layer: MoeLayer, family: str) -> None:
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
    prefix = f"{layer.facts.experts}."
    shared = [
        spec.name for spec in layer.facts.tensors if spec.name.startswith(prefix) and spec.tail
    ]
    if shared:
        raise PlanError(
            f"routed experts must have tensors of their own for neurons to be chosen, got "
            f"{family}, where {shared[0]} also holds experts that every token uses. Choose "
            "experts instead: frequency, reap and others do."
        )


def _factor(model: MoeModel, plan: Plan) -> None:
    """Carry out the plan on the layers that have ranks."""
    assert plan.factors is not None
    put = find_method(plan.factors.method).put
    walk = FactoringWalk(model, plan, planned_tensors, lambda: MemoryHome(model))
    layers = {layer.index: layer for layer in model.layers}
    states: list[Outputs] = [None] * walk.windows
    with quiet_transformers(), counting(len(walk.indices), "factor experts") as done:
        for index in walk.indices:
            step = walk.step(index, states)
            states = step.returned
            if step.factors is not None:
                if step.kept is not None:
                    layers[index].replace(step.kept)
                put(layers[index], step.factors.tensors)
            done()


def planned_tensors(layer: MoeLayer, plan: LayerPlan) -> dict[str, torch.Tensor] | None:
    """Make the tensors of a layer's planned experts, where they are not those that it has.

    Args:
        layer: The layer; it is not changed.
        plan: What it shall keep and merge.

    Returns:
        What :meth:`edgemoe.models.layer.MoeLayer.replace` takes; None where it keeps all.
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
    return not plan.is_merging and not plan.is_narrowing and len(plan.experts) == num_experts


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
        What :meth:`edgemoe.models.layer.MoeLayer.replace` takes.
    """
    return expert_tensors(layer, plan.experts)


def expert_tensors(
    layer: MoeLayer, experts: Sequence[MergedExpert], names: Collection[str] | None = None
) -> dict[str, torch.Tensor]:
    """Make the tensors of experts that are kept, narrowed and merged, in any order.

    Args:
        layer: The layer; it is not changed.
        experts: The experts.
        names: Which of ``facts.tensors`` to make; all by default. Of the experts module all or
            none are asked for where experts are merged.

    Returns:
        What :meth:`edgemoe.models.layer.MoeLayer.replace` takes.
    """
    groups = tuple(expert.members for expert in experts)
    prefix = f"{layer.facts.experts}."
    wanted = [spec for spec in layer.facts.tensors if names is None or spec.name in names]
    merged = {
        position: _merge(layer, expert)
        for position, expert in enumerate(experts)
        if len(expert.members) > 1 and any(spec.name.startswith(prefix) for spec in wanted)
    }

    size = layer.intermediate_size
    narrows = any(expert.neurons is not None for expert in experts)
    width = stored_width(experts, size) if narrows else size

    def combine(name: str, entries: torch.Tensor) -> torch.Tensor:
        part = name.removeprefix(prefix) if name.startswith(prefix) else None
        made = []
        for position, expert in enumerate(experts):
            if len(expert.members) == 1:
                entry = entries[expert.members[0]]
                if expert.neurons is not None and part in layer.layout.names:
                    neurons = torch.tensor(read_mask(expert.neurons))
                    entry = layer.layout.pick_neurons(part, entry, neurons, width)
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
            name, layer.tensor(f"{layer.facts.experts}.{name}")[members].float()
        )
        for name in layer.layout.names
    }
    return merge_experts(experts, expert.shares, reference=members.index(expert.aligned_to))
