"""One task's experts in a model that is in memory as a whole."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from edgemoe.layerwise.provider import InMemoryLayers
from edgemoe_exporters.bundle.task_experts import bind_experts, compressed
from edgemoe_exporters.sources.eager_run import run_eager

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import onnx_ir as ir

    from edgemoe.models.contract import MoeModel
    from edgemoe.plans.plan import Plan
    from edgemoe_exporters.bundle.expert_layout import StackLayout
    from edgemoe_exporters.sources.eager_run import EagerRun


@contextlib.contextmanager
def task_in_memory(
    moe: MoeModel, plan: Plan, layouts: Mapping[int, StackLayout], task: str
) -> Iterator[TaskInMemory]:
    """Yield a model with the experts of one task.

    Args:
        moe: The model, in float32.
        plan: The task's plan.
        layouts: The order of the experts by decoder layer.
        task: The task.

    Yields:
        The model with those; it is as before when the block ends.
    """
    with compressed(moe, plan, layouts, task) as small:
        yield TaskInMemory(small)


class TaskInMemory:
    """The model with one task's experts; a `sources.task_source.TaskSource`."""

    def __init__(self, small: MoeModel) -> None:
        """Wrap the compressed model.

        Args:
            small: The model.
        """
        self._small = small

    def bind(self, traced: ir.Model) -> ir.Model:
        """Bind this task's weights to a graph."""
        return bind_experts(traced, self._small)

    def run_eager(self, ids: Sequence[int]) -> list[EagerRun]:
        """Run the eager model."""
        return run_eager(InMemoryLayers(self._small), ids)
