"""The protocol of a model with one task's experts, as the stages of an export use it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx_ir as ir

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
