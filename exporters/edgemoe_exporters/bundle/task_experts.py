"""Apply each task's plan to one model, experts in the order of the bundle."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import onnx_ir as ir
from onnx_ir.tensor_adapters import TorchTensor

from edgemoe.apply.in_memory import apply_plan
from edgemoe.errors import ExportError
from edgemoe.models.k_policy import drop_k_policy
from edgemoe.models.layers.width import entry_size
from edgemoe.models.saving import set_expert_counts
from edgemoe.prune.registry import find_method
from edgemoe_exporters.bundle.expert_layout import ExpertKey, StackLayout, lay_out
from edgemoe_exporters.lowering.k_policy import bind_policy

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from edgemoe.models.contract import MoeModel
    from edgemoe.models.layers.layer import MoeLayer
    from edgemoe.models.shapes import ModelShape
    from edgemoe.plans.plan import LayerPlan, MergedExpert, Plan
    from edgemoe_runtime.bundle.task_entry import ExpertGroup


def refuse_factors(name: str, plan: Plan) -> None:
    """Refuse a plan that factors experts, which tasks could not share.

    Args:
        name: The task.
        plan: Its plan.

    Raises:
        ExportError: The plan has ranks.
    """
    if plan.factors is not None:
        raise ExportError(
            f"the plan of {name} must only keep and merge experts, got one that also factors "
            "them. Carry it out with `edgemoe apply`, and export what that writes."
        )


def lay_out_plans(plans: Mapping[str, Plan], shape: ModelShape) -> dict[int, StackLayout]:
    """Order the experts of every layer so that the tasks share what they have in common.

    A layer whose router compares experts in groups keeps its order, and is not stacked: the
    position of an expert decides its group. Nor is one that tasks store at different widths.

    Args:
        plans: The plan of each task.
        shape: The model that they are about.

    Returns:
        The layout by decoder layer; none for layers that must keep their order.
    """
    return lay_out_keys(
        {task: expert_keys(plan) for task, plan in plans.items()},
        [plan.widths(shape) for plan in plans.values()],
        shape,
    )


def lay_out_keys(
    keys: Mapping[str, Sequence[Sequence[ExpertKey]]],
    widths: Sequence[Sequence[int]],
    shape: ModelShape,
) -> dict[int, StackLayout]:
    """Order experts as `lay_out_plans` does, by keys of any kind.

    Args:
        keys: For each task and MoE layer what its experts are, equal where they may be equal.
        widths: For each task how wide the experts of each MoE layer are stored.
        shape: The whole model.

    Returns:
        The layout by decoder layer; none for layers that must keep their order.
    """
    by_layer = list(zip(*widths, strict=True))
    return {
        layer.layer: lay_out({task: layers[position] for task, layers in keys.items()})
        for position, layer in enumerate(shape.layers)
        if layer.n_group == 1 and len(set(by_layer[position])) == 1
    }


def expert_keys(plan: Plan) -> tuple[tuple[ExpertKey, ...], ...]:
    """Return for each MoE layer the keys of a plan's experts, which differ as weights do."""
    return tuple(tuple(_key(expert) for expert in layer.experts) for layer in plan.layers)


def sizes_after_pruning(
    method: str, shape: ModelShape, counts: Sequence[int]
) -> tuple[tuple[int, int], ...]:
    """Return experts and width of each MoE layer after an export that prunes itself.

    Args:
        method: Pruning method.
        shape: The model.
        counts: Experts to keep, or intermediate channels of each expert; empty where all stay.

    Returns:
        Experts and their width per MoE layer.
    """
    experts, widths = shape.experts_per_layer, shape.widths_per_layer
    if counts and find_method(method).prunes_width:
        widths = tuple(counts)
    elif counts:
        experts = tuple(counts)
    return tuple(zip(experts, widths, strict=True))


def count_parameters(
    model: MoeModel,
    plans: Mapping[str, Plan],
    layouts: Mapping[int, StackLayout],
    multiple: int = 1,
) -> int:
    """Count the parameters that a bundle stores.

    Args:
        model: The whole model, possibly on the meta device.
        plans: The plan of each task.
        layouts: The order of the experts by decoder layer.
        multiple: Their widths are padded to a multiple of this.

    Returns:
        Those of the backbone once, and those of each expert as often as it is stored.
    """
    total = sum(int(parameter.numel()) for parameter in model.model.parameters())
    widths = {task: plan.widths(model.shape) for task, plan in plans.items()}
    for position, layer in enumerate(model.layers):
        stored = {
            task: (len(plan.layers[position].experts), widths[task][position])
            for task, plan in plans.items()
        }
        if layer.index in layouts:
            width = next(iter(stored.values()))[1]
            stored = {"all": (len(layouts[layer.index].slots), width)}
        total += sum(_stored(layer, n, width, multiple) for n, width in stored.values())
        total -= _present(layer)
    return total


def _stored(layer: MoeLayer, experts: int, width: int, multiple: int) -> int:
    padded = -(-width // multiple) * multiple
    if layer.is_factored:
        return _present(layer) * experts // layer.num_experts
    return experts * sum(
        entry_size(layer, spec, padded) for spec in layer.spec.tensors if not spec.holds_ids
    )


def _present(layer: MoeLayer) -> int:
    return sum(int(tensor.numel()) for tensor in layer.tensors().values())


def count_least_parameters(
    model: MoeModel, kept: Sequence[Sequence[tuple[int, int]]], multiple: int = 1
) -> int:
    """Count the parameters that a bundle stores at least, before experts are chosen.

    Args:
        model: The whole model, possibly on the meta device.
        kept: Experts of each MoE layer that each task keeps, and how wide they are.
        multiple: Their widths are padded to a multiple of this.

    Returns:
        Those of the backbone, and in each layer those of the task that keeps most.
    """
    total = sum(int(parameter.numel()) for parameter in model.model.parameters())
    for layer, tasks in zip(model.layers, zip(*kept, strict=True), strict=True):
        total += max(_stored(layer, n, width, multiple) for n, width in tasks)
        total -= _present(layer)
    return total


@contextlib.contextmanager
def compressed(
    model: MoeModel, plan: Plan, layouts: Mapping[int, StackLayout], task: str
) -> Iterator[MoeModel]:
    """Yield the model with the experts of one task; it is as before when the block ends.

    Args:
        model: The whole model.
        plan: The task's plan.
        layouts: The order of the experts by decoder layer.
        task: The task.

    Yields:
        The task's model; it shares all other weights with `model`.

    Raises:
        PlanError: The plan does not fit the model.
    """
    whole = [layer.tensors() for layer in model.layers]
    # The k policy of a plan must not stay with the model.
    small = None
    try:
        small = apply_plan(model, plan)
        for layer, layer_plan in zip(small.layers, plan.layers, strict=True):
            if layer.index in layouts:
                order = _order(layer_plan, layouts[layer.index].experts_of(task))
                _permute(layer, order)
        yield small
    finally:
        if small is not None and plan.k_policy is not None:
            drop_k_policy(small)
        for layer, tensors in zip(model.layers, whole, strict=True):
            layer.replace(tensors)
        set_expert_counts(model)


def bind_experts(traced: ir.Model, model: MoeModel) -> ir.Model:
    """Bind the weights of one task to the graph of the whole model.

    The custom ops do not fix the number of experts, only the weights do: one trace serves
    every task, and every checkpoint that was made from the model.

    Args:
        traced: Graph of the whole model; it is not changed.
        model: The task's model.

    Returns:
        A graph that has the weights of `model` and shares their memory.
    """
    graph = traced.clone()
    tensors = dict(model.model.named_parameters(remove_duplicate=False))
    tensors.update(model.model.named_buffers(remove_duplicate=False))
    for name, value in graph.graph.initializers.items():
        if name in tensors:
            tensor = TorchTensor(tensors[name], name=name)
            value.const_value = tensor
            value.shape = ir.Shape(tensor.shape.numpy())
    bind_policy(graph, model.k_policy)
    return graph


def order_experts(
    plan: LayerPlan, layout: StackLayout | None, task: str
) -> tuple[MergedExpert, ...]:
    """Put a layer's planned experts in the order of the bundle.

    Args:
        plan: The layer's plan.
        layout: The order of its experts; None where they keep that of the plan.
        task: The task.

    Returns:
        The experts in the order in which a graph has them.
    """
    if layout is None:
        return plan.experts
    order = _order(plan, layout.experts_of(task))
    return tuple(plan.experts[position] for position in order)


def list_experts(
    plan: Plan, layouts: Mapping[int, StackLayout], task: str
) -> tuple[tuple[ExpertGroup, ...], ...]:
    """List the original ids of a task's experts in the order of its graph.

    Args:
        plan: The task's plan.
        layouts: The order of the experts by decoder layer.
        task: The task.

    Returns:
        Per MoE layer an id for each kept expert, and the ids of its members for each merged.
    """
    listed = []
    for layer in plan.layers:
        experts = order_experts(layer, layouts.get(layer.layer), task)
        listed.append(
            tuple(
                expert.members[0] if len(expert.members) == 1 else expert.members
                for expert in experts
            )
        )
    return tuple(listed)


def _key(expert: MergedExpert) -> ExpertKey:
    """Return a key that differs where weights differ."""
    if expert.neurons is not None:
        return expert.members[0], expert.neurons
    if len(expert.members) == 1:
        return expert.members[0]
    return expert.members, expert.shares, expert.aligned_to


def _order(plan: LayerPlan, keys: Sequence[ExpertKey]) -> list[int]:
    positions = {_key(expert): position for position, expert in enumerate(plan.experts)}
    return [positions[key] for key in keys]


def _permute(layer: MoeLayer, order: list[int]) -> None:
    if order == sorted(order):
        return
    layer.keep(order)
