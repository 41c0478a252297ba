"""What a task's graph is made from: a checkpoint, and the plan to carry out on it.

Most tasks have the exported checkpoint and a plan of their own. A task whose weights were
recovered has another checkpoint, made from the exported one, of which all experts stay; which
experts of the exported checkpoint these were, its provenance says, so that what recovery left
as it was is shared with other tasks.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgemoe.plans.keep_all import keep_all
from edgemoe_exporters.bundle.expert_layout import StackLayout
from edgemoe_exporters.bundle.task_experts import expert_keys, lay_out_keys
from edgemoe_exporters.lowering.k_policy import full_k

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from edgemoe.k_policy import KPolicy
    from edgemoe.models.contract import MoeModel
    from edgemoe.models.shapes import ModelShape
    from edgemoe.plans.plan import Plan
    from edgemoe_exporters.bundle.expert_layout import ExpertKey
    from edgemoe_exporters.sources.opening import ModelSource
    from edgemoe_exporters.sources.recovered import RecoveredCheckpoint
    from edgemoe_exporters.sources.task_source import TaskSource
    from edgemoe_runtime.bundle.task_entry import ExpertGroup

_OTHERS = "of another task"


@dataclass(frozen=True, kw_only=True)
class TaskModel:
    """One task's experts and where their weights are.

    Attributes:
        source: The checkpoint with its weights.
        plan: What is carried out on that.
        view: That checkpoint's structure; its tensors may have no contents.
        keys: What each expert is, by MoE layer: equal keys of two tasks may be equal weights.
        ids: The experts of the exported checkpoint behind each, by MoE layer.
        recovered: The recovered checkpoint; None where the weights are the exported one's own.
    """

    source: ModelSource
    plan: Plan
    view: MoeModel
    keys: tuple[tuple[ExpertKey, ...], ...]
    ids: tuple[tuple[ExpertGroup, ...], ...]
    recovered: RecoveredCheckpoint | None = None

    @classmethod
    def of_plan(cls, source: ModelSource, view: MoeModel, plan: Plan) -> TaskModel:
        """Take the weights of the exported checkpoint.

        Args:
            source: It.
            view: Its structure.
            plan: The task's plan.

        Returns:
            The task's model.
        """
        ids = tuple(
            tuple(
                expert.members[0] if len(expert.members) == 1 else expert.members
                for expert in layer.experts
            )
            for layer in plan.layers
        )
        return cls(source=source, plan=plan, view=view, keys=expert_keys(plan), ids=ids)

    @classmethod
    def of_recovered(cls, source: ModelSource, recovered: RecoveredCheckpoint) -> TaskModel:
        """Take the weights of a checkpoint that was made from the exported one.

        Args:
            source: The recovered checkpoint's weights.
            recovered: What it is.

        Returns:
            The task's model.
        """
        view = recovered.checkpoint.structure
        return cls(
            source=source,
            plan=keep_all(view.shape),
            view=view,
            keys=recovered.keys,
            ids=recovered.ids,
            recovered=recovered,
        )

    @property
    def policy(self) -> KPolicy | None:
        """How many experts its tokens use; None where that is always the router's top_k."""
        return self.plan.k_policy or self.view.k_policy

    @property
    def full_k(self) -> tuple[int, ...]:
        """How many experts its tokens may use in each MoE layer when nothing caps them."""
        return full_k(self.view, self.plan)

    @property
    def widths(self) -> tuple[int, ...]:
        """Intermediate channels of an expert of each MoE layer, as stored."""
        return self.plan.widths(self.view.shape)

    @property
    def trace_key(self) -> tuple[tuple[bool, bool], ...]:
        """What a traced graph depends on: whether layers are factored, or share bases."""
        return tuple((layer.is_factored, layer.is_based) for layer in self.view.layers)

    def list_experts(
        self, layouts: Mapping[int, StackLayout], task: str
    ) -> tuple[tuple[ExpertGroup, ...], ...]:
        """List the exported checkpoint's experts in the order of the task's graph.

        Args:
            layouts: The order of the experts by decoder layer.
            task: The task.

        Returns:
            Per MoE layer an id for each expert, and the ids of its members for a merged one.
        """
        listed = []
        for layer, keys, ids in zip(self.plan.layers, self.keys, self.ids, strict=True):
            layout = layouts.get(layer.layer)
            position = {key: index for index, key in enumerate(keys)}
            order = keys if layout is None else layout.experts_of(task)
            listed.append(tuple(ids[position[key]] for key in order))
        return tuple(listed)

    @contextlib.contextmanager
    def opened(self, layouts: Mapping[int, StackLayout], task: str) -> Iterator[TaskSource]:
        """Open the task's weights, experts in the order of the bundle.

        Args:
            layouts: The order of the experts by decoder layer.
            task: The task.

        Yields:
            The model. When the block ends the exported checkpoint is as before, and the memory
            of a recovered one is free.
        """
        local = layouts if self.recovered is None else self._by_own_ids(layouts, task)
        try:
            with self.source.of_task(self.plan, local, task) as small:
                yield small
        finally:
            if self.recovered is not None:
                self.source.release()

    def _by_own_ids(
        self, layouts: Mapping[int, StackLayout], task: str
    ) -> dict[int, StackLayout]:
        """Name the slots of the task's window by the recovered checkpoint's own experts."""
        found = {}
        for layer, keys in zip(self.plan.layers, self.keys, strict=True):
            layout = layouts.get(layer.layer)
            if layout is None:
                continue
            own = {key: index for index, key in enumerate(keys)}
            window = layout.windows[task]
            slots: list[ExpertKey] = [(_OTHERS, slot) for slot in range(len(layout.slots))]
            for slot in range(window.start, window.stop):
                slots[slot] = own[layout.slots[slot]]
            found[layer.layer] = StackLayout(slots=tuple(slots), windows=layout.windows)
        return found


def lay_out_tasks(tasks: Mapping[str, TaskModel], shape: ModelShape) -> dict[int, StackLayout]:
    """Order the experts of every layer so that the tasks share what they have in common.

    Args:
        tasks: The model of each task.
        shape: The exported checkpoint.

    Returns:
        As `edgemoe_exporters.bundle.task_experts.lay_out_plans`.
    """
    return lay_out_keys(
        {name: task.keys for name, task in tasks.items()},
        [task.widths for task in tasks.values()],
        shape,
    )


def kept_sizes(tasks: Sequence[TaskModel]) -> list[list[tuple[int, int]]]:
    """Return experts and their width per MoE layer, of tasks with the exported weights.

    Args:
        tasks: The tasks' models.

    Returns:
        A list for each task.
    """
    return [
        list(zip(task.plan.experts_per_layer, task.widths, strict=True))
        for task in tasks
        if task.recovered is None
    ]
