"""Make graphs of task models: trace once, bind a task's weights, lower, write."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from edgemoe_exporters.bundle.writer import BundleWriter, set_default_input
from edgemoe_exporters.lowering import onnxruntime as lower_ort
from edgemoe_exporters.lowering import tensorrt as lower_tensorrt
from edgemoe_exporters.lowering.k_policy import count_experts_used
from edgemoe_exporters.tracing.trace import trace
from edgemoe_exporters.validation.graph_runner import GraphRunner
from edgemoe_exporters.validation.sliced_runner import SlicedRunner, weight_bytes

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import onnx_ir as ir

    from edgemoe.resume import WorkDirectory
    from edgemoe_exporters.request import ExportRequest
    from edgemoe_exporters.sources.task_model import TaskModel
    from edgemoe_exporters.sources.task_source import TaskSource
    from edgemoe_exporters.targets import Target
    from edgemoe_exporters.validation.graph_calls import Runner


@dataclass(frozen=True)
class GraphMaker:
    """Makes the graphs of one export.

    Attributes:
        request: What to export.
        target: Its target.
        precision: Its precision.
        on_stage: Called with a short text at the beginning of each stage.
        limit: Largest graph that is opened as a whole, in bytes.
        work: Where outputs of slices are kept; None where none are.
    """

    request: ExportRequest
    target: Target
    precision: str
    on_stage: Callable[[str], None]
    limit: int
    work: WorkDirectory | None = None
    _traced: dict[object, ir.Model] = field(default_factory=dict)

    def traced(self, task: TaskModel) -> ir.Model:
        """Return the graph of all models that are built as a task's is, tracing the first.

        Args:
            task: The task; where it has the exported checkpoint's weights, its plan must not
                be carried out on these at the moment.

        Returns:
            The graph; it must not be changed.
        """
        if task.trace_key not in self._traced:
            self.on_stage("trace the model")
            self._traced[task.trace_key] = trace(task.source.moe)
        return self._traced[task.trace_key]

    def lowered(self, task: TaskModel, small: TaskSource, *, counts_experts: bool) -> ir.Model:
        """Bind a task's weights to a graph, and lower it for the target.

        Args:
            task: The task.
            small: Its weights, open.
            counts_experts: Whether the graph counts the experts that its tokens use.

        Returns:
            A new graph; its weights are computed when they are written.
        """
        bound = small.bind(self.traced(task))
        if counts_experts:
            count_experts_used(bound)
        lower: Callable[[ir.Model, str], ir.Model] = lower_ort.lower
        if self.target.flavour == "tensorrt":
            lower = partial(lower_tensorrt.lower, static_shapes=self.request.static_shapes)
        lowered = lower(bound, self.precision)
        if self.target.flavour == "ort":
            # optimum does not know this input, and opens bundles all the same.
            set_default_input(lowered, "k_cap", task.full_k)
        return lowered

    def write_alone(self, task: TaskModel, name: str, folder: Path) -> Path:
        """Write the graph of one task by itself, to measure it.

        Args:
            task: The task.
            name: What it is called.
            folder: An empty directory.

        Returns:
            The graph's file; its weights lie beside it.
        """
        with BundleWriter(folder, (name,)) as writer:
            self.traced(task)
            with task.opened({}, name) as small:
                writer.add_graph(name, self.lowered(task, small, counts_experts=False))
            writer.finish()
        return folder / f"{name}.onnx"

    def open(self, path: Path) -> Runner:
        """Open a written graph as a whole, or in slices where it is too large.

        Args:
            path: The graph.

        Returns:
            A runner.
        """
        if weight_bytes(path) <= self.limit:
            return GraphRunner(path)
        # Kernels may keep a second copy of a slice's matrices.
        return SlicedRunner(path, self.limit // 4, self.work)
