"""Sources of the model of an export: memory, or a checkpoint that is larger than it.

A model within the limit is loaded whole, which is fastest where several passes read it; the
weights of a larger one are read when they are written, and passes run one decoder layer at a
time. Both give the same bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import AbstractContextManager

    import onnx_ir as ir
    from tokenizers import Tokenizer

    from edgemoe.calibrate.statistics import Statistics
    from edgemoe.evaluate.scorer import Scorer
    from edgemoe.layerwise.provider import Home
    from edgemoe.models.contract import MoeModel
    from edgemoe.plans.plan import Plan
    from edgemoe.tasks import TaskFile
    from edgemoe_exporters.bundle.expert_layout import StackLayout
    from edgemoe_exporters.sources.eager_run import EagerRun


class TaskSource(Protocol):
    """The model with the experts of one task."""

    def bind(self, traced: ir.Model) -> ir.Model:
        """Bind this task's weights to a graph of the whole model, which is not changed.

        Args:
            traced: The model's graph, as `tracing.trace.trace` returned it.

        Returns:
            A new graph.
        """
        ...

    def run_eager(self, ids: Sequence[int]) -> list[EagerRun]:
        """Run the eager model, as `sources.eager_run.run_eager`."""
        ...


class ModelSource(Protocol):
    """A checkpoint to export."""

    @property
    def moe(self) -> MoeModel:
        """The whole model; without contents where it is streamed."""
        ...

    @property
    def is_streamed(self) -> bool:
        """Whether its decoder layers are in memory one at a time."""
        ...

    def home(self) -> Home:
        """Return where its layers are, for methods that run them."""
        ...

    def collect(self, task: TaskFile, tokenizer: Tokenizer, max_tokens: int) -> Statistics:
        """Collect statistics of a task, as `edgemoe.calibrate.collect.collect`."""
        ...

    def scorer(self) -> Scorer:
        """Return a scorer of the whole model."""
        ...

    def of_task(
        self, plan: Plan, layouts: Mapping[int, StackLayout], task: str
    ) -> AbstractContextManager[TaskSource]:
        """Yield the model with the experts of one task.

        Args:
            plan: The task's plan.
            layouts: The order of the experts by decoder layer.
            task: The task.

        Returns:
            A context manager; the task's model is valid inside it.
        """
        ...
