"""One task's experts in a checkpoint that is larger than memory.

Weights are read when they are written, and layers run one at a time.
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import from_torch_dtype

from edgemoe.apply.checks import check_width_pruning, refuse_k_policy
from edgemoe.apply.expert_tensors import expert_tensors
from edgemoe.errors import ExportError
from edgemoe.layerwise.provider import StreamedLayers
from edgemoe.models.k_policy import following
from edgemoe.models.layers.width import widened_shapes
from edgemoe.plans.layer_plan import stored_width
from edgemoe_exporters.bundle.task_experts import order_experts
from edgemoe_exporters.graph.lazy_weights import LatestResult, LazyWeight
from edgemoe_exporters.lowering.k_policy import bind_policy
from edgemoe_exporters.sources.eager_run import run_eager

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import numpy as np

    from edgemoe.models.expert_tensors import ExpertTensor
    from edgemoe.models.layers.layer import MoeLayer
    from edgemoe.models.opening import StreamedModel
    from edgemoe.plans.plan import MergedExpert, Plan
    from edgemoe.resume import WorkDirectory
    from edgemoe_exporters.bundle.expert_layout import StackLayout
    from edgemoe_exporters.sources.eager_run import EagerRun


@contextlib.contextmanager
def streamed_task(
    streamed: StreamedModel,
    plan: Plan,
    layouts: Mapping[int, StackLayout],
    task: str,
    work: WorkDirectory,
) -> Iterator[StreamedTask]:
    """Yield a checkpoint that is read as needed with the experts of one task.

    Args:
        streamed: The checkpoint.
        plan: The task's plan.
        layouts: The order of the experts by decoder layer.
        task: The task.
        work: Keeps outputs of layers; nothing is left there.

    Yields:
        The checkpoint with those; it is as before when the block ends.

    Raises:
        PlanError: The plan does not fit the model.
    """
    moe = streamed.moe
    plan.validate(moe.shape)
    check_width_pruning(plan, moe)
    experts = {
        layer.index: order_experts(layer_plan, layouts.get(layer.index), task)
        for layer, layer_plan in zip(moe.layers, plan.layers, strict=True)
    }
    refuse_k_policy(plan, moe)
    with following(moe, plan.k_policy or moe.k_policy):
        yield StreamedTask(streamed, experts, work, task)


class StreamedTask:
    """The checkpoint with one task's experts; a `sources.task_source.TaskSource`."""

    def __init__(
        self,
        streamed: StreamedModel,
        experts: Mapping[int, Sequence[MergedExpert]],
        work: WorkDirectory,
        name: str,
    ) -> None:
        """Wrap a checkpoint and the experts of one task.

        Args:
            streamed: The checkpoint.
            experts: By decoder layer, in the order of the graph.
            work: Keeps outputs of layers.
            name: The task.
        """
        self._streamed = streamed
        self._work = work
        self._name = name
        self._changes = {
            layer.index: (layer, experts[layer.index])
            for layer in streamed.moe.layers
            if not _is_unchanged(layer, experts[layer.index])
        }
        self._latest = LatestResult()

    def bind(self, traced: ir.Model) -> ir.Model:
        """Bind this task's weights to a graph; they are read when they are written."""
        graph = traced.clone()
        model = self._streamed.moe.model
        present = dict(model.named_parameters(remove_duplicate=False))
        present.update(model.named_buffers(remove_duplicate=False))
        changed = {
            f"{layer.name}.{spec.name}": (layer.index, spec.name)
            for layer, _ in self._changes.values()
            for spec in layer.spec.tensors
        }
        shapes = {index: self._planned_shapes(index) for index in self._changes}
        for name, value in graph.graph.initializers.items():
            if name not in present:
                _refuse_empty(value)
                continue
            stored = present[name]
            shape, read = tuple(stored.shape), partial(self._read, name)
            if name in changed:
                index, spec_name = changed[name]
                shape = shapes[index][spec_name]
                read = partial(self._read_planned, index, spec_name)
            tensor = LazyWeight(shape, from_torch_dtype(stored.dtype), read).tensor(name)
            value.const_value = tensor
            value.shape = ir.Shape(shape)
        bind_policy(graph, self._streamed.moe.k_policy)
        return graph

    def run_eager(self, ids: Sequence[int]) -> list[EagerRun]:
        """Run the eager model, one decoder layer at a time."""
        layers = StreamedLayers(self._streamed, inside=self._changed)
        return run_eager(layers, ids, self._work, self._name)

    @contextlib.contextmanager
    def _changed(self, index: int) -> Iterator[None]:
        """Replace the experts of a layer that is in memory by this task's."""
        if index not in self._changes:
            yield
            return
        layer, experts = self._changes[index]
        whole = layer.tensors()
        with torch.no_grad():
            new = expert_tensors(layer, experts)
        layer.replace(new)
        del new
        # The layer's own tensors are freed meanwhile: only their shapes are kept.
        empty = {
            name: torch.empty_like(tensor, device="meta") for name, tensor in whole.items()
        }
        whole.clear()
        try:
            yield
        finally:
            layer.replace(empty)

    def _planned_shapes(self, index: int) -> dict[str, tuple[int, ...]]:
        layer, experts = self._changes[index]
        shapes = {
            spec.name: _planned_shape(layer, spec, len(experts)) for spec in layer.spec.tensors
        }
        width = stored_width(experts, layer.intermediate_size)
        if width != layer.intermediate_size:
            for name, shape in widened_shapes(layer, width).items():
                # Tensors with intermediate channels have experts on the first axis.
                shapes[name] = (shapes[name][0], *shape[1:])
        return shapes

    def _read(self, name: str) -> np.ndarray[Any, Any]:
        return _to_numpy(self._streamed.skeleton.read(name))

    def _read_planned(self, index: int, name: str) -> np.ndarray[Any, Any]:
        layer, experts = self._changes[index]
        matrices = [
            spec.name
            for spec in layer.spec.tensors
            if spec.name.startswith(f"{layer.spec.experts}.")
        ]
        if name not in matrices or all(len(expert.members) == 1 for expert in experts):
            return _to_numpy(self._make(layer, experts, [name])[name])
        # Members are aligned by all their matrices, so these are made together.
        made = self._latest.get(layer, lambda: self._make(layer, experts, matrices))
        return _to_numpy(made[name])

    @torch.no_grad()
    def _make(
        self, layer: MoeLayer, experts: Sequence[MergedExpert], names: Sequence[str]
    ) -> dict[str, torch.Tensor]:
        skeleton = self._streamed.skeleton
        wanted = {f"{layer.name}.{name}" for name in names}
        only = {
            group.first_target
            for group in skeleton.groups[layer.index]
            if wanted.intersection(group.targets)
        }
        with skeleton.layer(layer.index, only=only):
            return expert_tensors(layer, experts, names)


def _refuse_empty(value: ir.Value) -> None:
    """Refuse a constant that a trace without weights could not compute."""
    raw = getattr(value.const_value, "raw", None)
    if isinstance(raw, torch.Tensor) and raw.is_meta:
        raise ExportError(
            "a model that is larger than memory must have no constants but its weights, got "
            f"{value.name}, which its code computes. Export it on a machine with more memory."
        )


def _is_unchanged(layer: MoeLayer, experts: Sequence[MergedExpert]) -> bool:
    members = [(expert.members, expert.neurons) for expert in experts]
    return members == [((expert,), None) for expert in range(layer.num_experts)]


def _planned_shape(layer: MoeLayer, spec: ExpertTensor, experts: int) -> tuple[int, ...]:
    shape = list(layer.tensor(spec.name).shape)
    if not spec.holds_ids:
        shape[spec.axis] = experts + spec.tail
    return tuple(shape)


def _to_numpy(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    array: np.ndarray[Any, Any] = tensor.detach().numpy()
    return array
