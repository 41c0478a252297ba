"""Carry out a plan on a model that is in memory.

Experts are kept and merged first; what is left is factored, where the plan has ranks.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from edgemoe.apply.checks import check_ranks, check_width_pruning, refuse_k_policy
from edgemoe.apply.expert_tensors import (
    applied_layer,
    apply_layer,
    keeps_all,
    planned_tensors,
)
from edgemoe.apply.provenance import describe_plan
from edgemoe.decompose.walk import FactoringTask
from edgemoe.layerwise.provider import InMemoryLayers
from edgemoe.models.k_policy import following, put_k_policy
from edgemoe.models.saving import set_expert_counts
from edgemoe.progress import track

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from edgemoe.decompose.layer_factors import LayerFactors
    from edgemoe.models.contract import MoeModel
    from edgemoe.models.layers.layer import MoeLayer
    from edgemoe.plans.plan import Plan


@torch.no_grad()
def apply_plan(model: MoeModel, plan: Plan) -> MoeModel:
    """Keep and merge experts as planned, layer by layer, in place.

    A kept expert's tensors are copied bit for bit. A merged expert is the weighted average of
    its aligned members, and its router row is the weighted average of their rows: a start that
    a router trained afterwards improves on, and that needs no data. With ranks, each layer is
    factored on what the factored layers before it return for the plan's tokens.

    Args:
        model: The model; it is changed and must not be used as the original any more.
        plan: The decision.

    Returns:
        The compressed model, whose `path` is None because no checkpoint equals it yet.

    Raises:
        PlanError: The plan does not fit the model; then nothing has changed.
        StreamingError: The plan's method runs layers one by one, which the family's cannot; the
            model is of no use then.
    """
    plan.validate(model.shape)
    check_ranks(plan, model.layers)
    sha256 = model.sha256
    plan.validate(model.shape, sha256)
    check_width_pruning(plan, model)
    refuse_k_policy(plan, model)
    if plan.factors is not None:
        _PutFactors(InMemoryLayers(model), plan, planned_tensors).run("factor experts")
    pairs = list(zip(model.layers, plan.layers, strict=True))
    for layer, layer_plan in track(pairs, "Applying the plan"):
        if layer_plan.ranks is None and not keeps_all(layer_plan, layer.num_experts):
            apply_layer(layer, layer_plan)
    set_expert_counts(model)
    found = replace(model, path=None, provenance=describe_plan(plan, model, sha256))
    put_k_policy(found, plan.k_policy)
    return found


@contextlib.contextmanager
def applied(model: MoeModel, plan: Plan) -> Iterator[None]:
    """Carry out a plan for a while, as `apply_plan` does for good.

    Args:
        model: The model; the experts that are kept are in memory twice meanwhile.
        plan: The decision; that it is about this checkpoint is for the caller to know.

    Yields:
        Nothing. When the block ends the model is as it was.

    Raises:
        PlanError: The plan does not fit the model; then nothing has changed.
    """
    plan.validate(model.shape)
    check_width_pruning(plan, model)
    with contextlib.ExitStack() as stack:
        for layer, layer_plan in zip(model.layers, plan.layers, strict=True):
            stack.enter_context(applied_layer(layer, layer_plan))
        if plan.k_policy is not None:
            stack.enter_context(following(model, plan.k_policy))
        yield


class _PutFactors(FactoringTask):
    """Gives each layer the experts that are kept, and the factors of these."""

    def take(
        self,
        layer: MoeLayer,
        kept: Mapping[str, torch.Tensor] | None,
        factors: LayerFactors,
    ) -> None:
        if kept is not None:
            layer.replace(kept)
        self.method.put(layer, factors.tensors)
