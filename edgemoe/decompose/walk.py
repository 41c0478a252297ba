"""Factor one layer after the other, each on what the factored layers before it return."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgemoe.decompose.registry import Decomposition
from edgemoe.oracle.oracle import LayerOracle

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import TypeAlias

    import torch

    from edgemoe.decompose.layer_factors import LayerFactors
    from edgemoe.layerwise.provider import LayerProvider
    from edgemoe.layerwise.replay import Outputs
    from edgemoe.models.contract import MoeModel
    from edgemoe.models.layer import MoeLayer
    from edgemoe.plans.layer_plan import LayerPlan
    from edgemoe.plans.plan import Plan

    # Makes what a plan keeps and merges of a layer; None where it keeps all experts.
    Prepare: TypeAlias = Callable[[MoeLayer, LayerPlan], Mapping[str, torch.Tensor] | None]


@dataclass(frozen=True)
class Step:
    """What became of one decoder layer.

    Attributes:
        returned: What it returns for each window now; none after the last layer that matters,
            or where no token is looked at.
        kept: Tensors of the experts that the plan keeps, which
            :meth:`edgemoe.models.layer.MoeLayer.replace` takes; None where all are kept.
        factors: Factors of those; None where they stay whole.
    """

    returned: list[Outputs]
    kept: Mapping[str, torch.Tensor] | None = None
    factors: LayerFactors | None = None


class FactoringWalk:
    """Decoder layers under a plan with ranks, from the first one on.

    Attributes:
        indices: Decoder layers to visit, ascending.
        windows: How many windows of tokens there are.
    """

    def __init__(
        self,
        model: MoeModel,
        plan: Plan,
        prepare: Prepare,
        open_layers: Callable[[], LayerProvider],
        *,
        go_on_factored: bool = True,
    ) -> None:
        """Prepare a walk.

        Args:
            model: The model; it is as before after every step.
            plan: A plan with ranks, which was validated for the model.
            prepare: Makes what the plan keeps and merges.
            open_layers: Tells where the model's layers are, for a method that looks at tokens.
            go_on_factored: Whether later layers see what factored ones return; what whole ones
                return otherwise.

        Raises:
            PlanError: The method or its options are unknown, or its tokens.
            StreamingError: The method looks at tokens, and the model's layers cannot be told
                apart.
        """
        assert plan.factors is not None
        self._decomposition = Decomposition.of(plan.factors)
        self._decomposition.check_vocabulary(model)
        self._prepare = prepare
        self._go_on_factored = go_on_factored
        self._layers = {layer.index: layer for layer in model.layers}
        self._plans = {layer.layer: layer for layer in plan.layers}
        self._last = max(layer.layer for layer in plan.layers if layer.ranks is not None)
        windows = self._decomposition.windows
        self._oracle = LayerOracle(open_layers(), windows) if windows else None
        self.windows = len(windows)
        self.indices: Sequence[int] = (
            range(self._last + 1)
            if windows
            else [layer.layer for layer in plan.layers if layer.ranks is not None]
        )

    def step(self, index: int, before: Sequence[Outputs]) -> Step:
        """Factor a decoder layer, whose weights are in memory, and run it.

        Args:
            index: One of :attr:`indices`.
            before: What the layer before it returned for each window; None for the first.

        Returns:
            What became of it. The layer is as it was.

        Raises:
            StreamingError: The family cannot be run layer by layer.
            CheckpointError: The layer is factored already, or its weights are not finite.
        """
        layer, plan = self._layers.get(index), self._plans.get(index)
        if layer is None or plan is None:
            return Step(self._run(index, before))
        with contextlib.ExitStack() as stack:
            kept = self._prepare(layer, plan)
            if kept is not None:
                stack.enter_context(layer.changed(kept))
            factors = None
            if plan.ranks is not None:
                factors = self._factor(layer, plan.ranks, before)
                if self._go_on_factored:
                    stack.enter_context(
                        self._decomposition.method.inside(layer, factors.tensors)
                    )
            return Step(self._run(index, before), kept, factors)

    def _factor(
        self, layer: MoeLayer, ranks: Sequence[tuple[int, int]], before: Sequence[Outputs]
    ) -> LayerFactors:
        method, options = self._decomposition.method, self._decomposition.options
        if self._oracle is None:
            return method.factor(layer, ranks, **options)
        return method.factor(self._oracle.view(layer, before), ranks, **options)

    def _run(self, index: int, before: Sequence[Outputs]) -> list[Outputs]:
        if self._oracle is None or index == self._last:
            return []
        return self._oracle.run_layer(index, before)
