"""A model that is in memory as a whole."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from edgemoe.calibrate.collect import collect
from edgemoe.evaluate.torch_scorer import TorchScorer
from edgemoe.layerwise.provider import InMemoryLayers
from edgemoe_exporters.bundle.task_experts import bind_experts, compressed
from edgemoe_exporters.sources.eager_run import run_eager

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import onnx_ir as ir
    from tokenizers import Tokenizer

    from edgemoe.calibrate.statistics import Statistics
    from edgemoe.models.contract import MoeModel
    from edgemoe.plans.plan import Plan
    from edgemoe.tasks import TaskFile
    from edgemoe_exporters.bundle.expert_layout import StackLayout
    from edgemoe_exporters.sources.eager_run import EagerRun


class SourceInMemory:
    """A model that was loaded; see :class:`edgemoe_exporters.sources.protocol.ModelSource`."""

    is_streamed = False

    def __init__(self, moe: MoeModel) -> None:
        """Take a model.

        Args:
            moe: The model, in float32.
        """
        self.moe = moe

    def home(self) -> InMemoryLayers:
        """Return where its layers are."""
        return InMemoryLayers(self.moe)

    def collect(self, task: TaskFile, tokenizer: Tokenizer, max_tokens: int) -> Statistics:
        """Measure a task."""
        return collect(self.moe, [task], tokenizer, max_tokens=max_tokens)

    def scorer(self) -> TorchScorer:
        """Return what scores with the model."""
        return TorchScorer(self.moe)

    @contextlib.contextmanager
    def of_task(
        self, plan: Plan, layouts: Mapping[int, StackLayout], task: str
    ) -> Iterator[TaskInMemory]:
        """Give the model the experts of one task, until the block ends."""
        with compressed(self.moe, plan, layouts, task) as small:
            yield TaskInMemory(small)


class TaskInMemory:
    """The model with one task's experts; a `sources.protocol.TaskSource`."""

    def __init__(self, small: MoeModel) -> None:
        """Take the compressed model.

        Args:
            small: The model.
        """
        self._small = small

    def bind(self, traced: ir.Model) -> ir.Model:
        """Give a graph this task's weights."""
        return bind_experts(traced, self._small)

    def run_eager(self, ids: Sequence[int]) -> list[EagerRun]:
        """Ask the eager model."""
        return run_eager(InMemoryLayers(self._small), ids)
