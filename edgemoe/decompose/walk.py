"""Factor one layer after the other, each on what the factored layers before it return."""

from __future__ import annotations

import abc
import contextlib
from typing import TYPE_CHECKING

from edgemoe.decompose.registry import Decomposition
from edgemoe.layerwise.runner import LayerTask, run_layers
from edgemoe.oracle.oracle import batches_of, view_layer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from typing import TypeAlias

    import torch

    from edgemoe.decompose.layer_factors import LayerFactors
    from edgemoe.layerwise.provider import LayerProvider
    from edgemoe.layerwise.returned import Outputs
    from edgemoe.layerwise.runner import Visit
    from edgemoe.models.layers.layer import MoeLayer
    from edgemoe.plans.layer_plan import LayerPlan
    from edgemoe.plans.plan import Plan
    from edgemoe.resume import WorkDirectory

    # Makes what a plan keeps and merges of a layer; None where it keeps all experts.
    Prepare: TypeAlias = Callable[[MoeLayer, LayerPlan], Mapping[str, torch.Tensor] | None]


class FactoringTask(LayerTask, abc.ABC):
    """Factors the layers of a plan with ranks; a subclass says what becomes of the factors.

    Attributes:
        indices: Decoder layers to visit, ascending.
        method: How they are factored.
    """

    def __init__(
        self,
        provider: LayerProvider,
        plan: Plan,
        prepare: Prepare,
        *,
        go_on_factored: bool = True,
    ) -> None:
        """Prepare to factor.

        Args:
            provider: The model; a visited layer is as before until `take` gets it.
            plan: A plan with ranks, which was validated for the model.
            prepare: Makes what the plan keeps and merges.
            go_on_factored: Whether later layers see what factored ones return; what whole ones
                return otherwise.

        Raises:
            PlanError: The method or its options are unknown, or its tokens.
            StreamingError: The method looks at tokens, and the model's layers cannot be told
                apart.
        """
        assert plan.factors is not None
        self._provider = provider
        self._decomposition = Decomposition.of(plan.factors)
        self.method = self._decomposition.method
        self._decomposition.check_vocabulary(provider.moe)
        self._prepare = prepare
        self._go_on_factored = go_on_factored
        self._layers = {layer.index: layer for layer in provider.moe.layers}
        self._plans = {layer.layer: layer for layer in plan.layers}
        self._batches = batches_of(self._decomposition.windows)
        ranked = [layer.layer for layer in plan.layers if layer.ranks is not None]
        self.indices: Sequence[int] = range(ranked[-1] + 1) if self._batches else ranked
        # Refused before anything is changed.
        assert not self._batches or len(provider.layers) > ranked[-1]

    def run(self, description: str, work: WorkDirectory | None = None) -> None:
        """Factor every layer that has ranks.

        Args:
            description: What the progress bar says.
            work: For what an interrupted run goes on from; None keeps nothing.

        Raises:
            StreamingError: The family cannot be run layer by layer.
            CheckpointError: A layer is factored already, or its weights are not finite.
        """
        run_layers(
            self._provider,
            self._batches,
            self,
            description=description,
            layers=self.indices,
            work=work,
            name="factor",
        )

    @abc.abstractmethod
    def take(
        self,
        layer: MoeLayer,
        kept: Mapping[str, torch.Tensor] | None,
        factors: LayerFactors,
    ) -> None:
        """Take what became of a layer, which is as it was and in memory.

        Args:
            layer: The layer.
            kept: Tensors of the experts that the plan keeps, which
                `edgemoe.models.layers.layer.MoeLayer.replace` takes; None where all are kept.
            factors: Factors of those.
        """

    def visit(self, visit: Visit) -> Iterator[Outputs]:
        """Factor a layer, and run it."""
        layer, plan = self._layers.get(visit.index), self._plans.get(visit.index)
        if layer is None or plan is None:
            yield from visit.run()
            return
        factors = None
        with contextlib.ExitStack() as stack:
            kept = self._prepare(layer, plan)
            if kept is not None:
                stack.enter_context(layer.changed(kept))
            if plan.ranks is not None:
                factors = self._factor(layer, plan.ranks, visit)
                if self._go_on_factored:
                    stack.enter_context(self.method.inside(layer, factors.tensors))
            if self._batches and visit.index != self.indices[-1]:
                yield from visit.run()
        if factors is not None:
            self.take(layer, kept, factors)

    def _factor(
        self, layer: MoeLayer, ranks: Sequence[tuple[int, int]], visit: Visit
    ) -> LayerFactors:
        found = view_layer(visit, layer)[1] if self._batches else layer
        return self.method.factor(found, ranks, **self._decomposition.options)
