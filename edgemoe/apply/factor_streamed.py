"""Factor the layers of a checkpoint that is larger than memory, one after the other.

A layer's factors go into the work directory as soon as it is done: an interrupted run goes on
with the next layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgemoe.apply.expert_tensors import planned_tensors
from edgemoe.decompose.walk import FactoringTask
from edgemoe.disk import require_space
from edgemoe.layerwise.finished_layers import layers_done
from edgemoe.layerwise.provider import StreamedLayers

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from edgemoe.decompose.layer_factors import LayerFactors
    from edgemoe.models.layers.layer import MoeLayer
    from edgemoe.models.opening import StreamedModel
    from edgemoe.plans.plan import Plan
    from edgemoe.resume import WorkDirectory


def factor_streamed(
    streamed: StreamedModel,
    plan: Plan,
    work: WorkDirectory,
    shapes: Mapping[int, Mapping[str, torch.Tensor]],
) -> None:
    """Factor every layer that has ranks.

    Args:
        streamed: The checkpoint.
        plan: Its plan, which was validated.
        work: Gets the factors, as `finished_layers.read_state` reads them, in the types to be
            stored; has those of an earlier run.
        shapes: By decoder layer what its factors are like, in types and shapes; empty for one
            that stays whole.

    Raises:
        PlanError: The plan's method, options or tokens are refused.
        StreamingError: The method runs layers, and the family's cannot be run one by one.
        OutputError: The disk has not enough space.
    """
    task = _KeepFactors(StreamedLayers(streamed), plan, planned_tensors)
    task.shapes = shapes
    left = task.indices[layers_done(work) :]
    if left:
        missing = (tensor for index in left for tensor in shapes.get(index, {}).values())
        require_space(work.path, sum(tensor.nbytes for tensor in missing))
    task.run("factor experts", work)


class _KeepFactors(FactoringTask):
    """Keeps the factors of each layer in the types that they are stored in."""

    shapes: Mapping[int, Mapping[str, torch.Tensor]]
    _taken: LayerFactors | None = None

    def take(self, layer: MoeLayer, kept: object, factors: LayerFactors) -> None:
        del layer, kept
        self._taken = factors

    def state(self, index: int) -> dict[str, torch.Tensor]:
        taken, self._taken = self._taken, None
        if taken is None:
            return {}
        shapes = self.shapes[index]
        return {name: one.to(shapes[name].dtype) for name, one in taken.tensors.items()}
