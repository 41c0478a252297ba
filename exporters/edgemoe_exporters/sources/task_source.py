"""What the stages of an export ask of the model with one task's experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx_ir as ir

    from edgemoe_exporters.sources.eager_run import EagerRun


class TaskSource(Protocol):
    """The model with the experts of one task."""

    def bind(self, traced: ir.Model) -> ir.Model:
        """Give a graph of the whole model this task's weights; it is not changed.

        Args:
            traced: What `edgemoe_exporters.tracing.trace.trace` made of the model.

        Returns:
            A new graph.
        """
        ...

    def run_eager(self, ids: Sequence[int]) -> list[EagerRun]:
        """Run the eager model, as `edgemoe_exporters.sources.eager_run.run_eager`."""
        ...
