"""The source of the model of an export: memory, or a checkpoint that is larger than it.

A model within the limit is loaded whole, which is fastest where several passes read it; the
weights of a larger one are read when they are written, and passes run one decoder layer at a
time. Both give the same bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgemoe.calibrate.collect import collect
from edgemoe.evaluate.torch_scorer import TorchScorer
from edgemoe.layerwise.provider import InMemoryLayers, StreamedLayers
from edgemoe.models.checkpoint import load_model
from edgemoe.models.loading import GENERATION_FILE, read_generation_settings
from edgemoe.resume import WorkDirectory
from edgemoe_exporters.sources.in_memory import task_in_memory
from edgemoe_exporters.sources.streamed import streamed_task

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import AbstractContextManager

    from tokenizers import Tokenizer

    from edgemoe.calibrate.statistics import Statistics
    from edgemoe.layerwise.provider import LayerProvider
    from edgemoe.models.checkpoint import Checkpoint
    from edgemoe.models.contract import MoeModel
    from edgemoe.models.opening import StreamedModel
    from edgemoe.plans.plan import Plan
    from edgemoe.tasks import TaskFile
    from edgemoe_exporters.bundle.expert_layout import StackLayout
    from edgemoe_exporters.sources.task_source import TaskSource


class ModelSource:
    """A checkpoint to export; one that fits into memory is loaded when it is first needed."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        streamed: StreamedModel | None = None,
        work: WorkDirectory | None = None,
    ) -> None:
        """Wrap a checkpoint; nothing is loaded yet.

        Args:
            checkpoint: The checkpoint.
            streamed: The same, open layer by layer because it is larger than memory, or None.
            work: Where a streamed export keeps finished steps.
        """
        self._checkpoint, self._streamed, self._work = checkpoint, streamed, work
        self._layers: LayerProvider | None = None
        if streamed is None:
            return
        self._layers = StreamedLayers(streamed, checkpoint.hashes)
        # A skeleton has the configuration of the model only.
        settings = None if checkpoint.gguf is None else checkpoint.read(GENERATION_FILE)
        read_generation_settings(streamed.moe.model, checkpoint.path, settings)

    @property
    def layers(self) -> LayerProvider:
        """Its decoder layers, for methods that run them."""
        if self._layers is None:
            self._layers = InMemoryLayers(load_model(self._checkpoint))
        return self._layers

    def release(self) -> None:
        """Free the memory of a model that is loaded; it is loaded again where it is needed."""
        if self._streamed is None:
            self._layers = None

    @property
    def moe(self) -> MoeModel:
        """The whole model; without contents where it is streamed."""
        return self.layers.moe

    @property
    def is_streamed(self) -> bool:
        """Whether its decoder layers are in memory one at a time."""
        return self._streamed is not None

    def collect(self, task: TaskFile, tokenizer: Tokenizer, max_tokens: int) -> Statistics:
        """Collect statistics of a task, as `edgemoe.calibrate.collect.collect`."""
        if self._work is None:
            return collect(self.layers, [task], tokenizer, max_tokens=max_tokens)
        # An interrupted export left statistics of the next task there.
        folder = self._work.path / f"calibration-{task.name}"
        folder.mkdir(exist_ok=True)
        work = WorkDirectory(folder)
        found = collect(self.layers, [task], tokenizer, max_tokens=max_tokens, work=work)
        self._work.remove(folder.name)
        return found

    def scorer(self) -> TorchScorer:
        """Return a scorer of the whole model."""
        return TorchScorer(self.layers, work=self._work)

    def of_task(
        self, plan: Plan, layouts: Mapping[int, StackLayout], task: str
    ) -> AbstractContextManager[TaskSource]:
        """Return a context with the experts of one task.

        Args:
            plan: The task's plan.
            layouts: The order of the experts by decoder layer.
            task: The task.

        Returns:
            A context manager; the task's model is valid inside it.
        """
        if self._streamed is None:
            return task_in_memory(self.moe, plan, layouts, task)
        assert self._work is not None
        return streamed_task(self._streamed, plan, layouts, task, self._work)
