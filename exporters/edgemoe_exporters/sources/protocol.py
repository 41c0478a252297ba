"""Where an export takes its model from: memory, or a checkpoint that is larger than it.

What fits into the limit is loaded whole, which is fastest where several passes read it; the
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
    from edgemoe.layerwise.provider import LayerProvider
    from edgemoe.models.contract import MoeModel
    from edgemoe.plans.plan import Plan
    from edgemoe.tasks import TaskFile
    from edgemoe_exporters.bundle.expert_layout import StackLayout
    from edgemoe_exporters.sources.eager_run import EagerRun


class TaskSource(Protocol):
    """The model with the experts of one task."""

    def bind(self, traced: ir.Model) -> ir.Model:
        """Give a graph of the whole model this task's weights; it is not changed.

        Args:
            traced: What :func:`edgemoe_exporters.tracing.trace.trace` made of the model.

        Returns:
            A new graph.
        """
        ...

    def run_eager(self, ids: Sequence[int]) -> list[EagerRun]:
        """Ask the eager model, as :func:`edgemoe_exporters.sources.eager_run.run_eager`."""
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

    def home(self) -> LayerProvider:
        """Return where its layers are, for methods that run them."""
        ...

    def collect(self, task: TaskFile, tokenizer: Tokenizer, max_tokens: int) -> Statistics:
        """Measure a task, as :func:`edgemoe.calibrate.collect.collect`."""
        ...

    def scorer(self) -> Scorer:
        """Return what scores with the whole model."""
        ...

    def of_task(
        self, plan: Plan, layouts: Mapping[int, StackLayout], task: str
    ) -> AbstractContextManager[TaskSource]:
        """Give the model the experts of one task.

        Args:
            plan: The task's plan.
            layouts: The order of the experts by decoder layer.
            task: The task.

        Returns:
            A context; the task's model serves inside it.
        """
        ...
