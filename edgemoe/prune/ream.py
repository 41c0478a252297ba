"""ream: Router-weighted Expert Activation Merging (2026).

https://arxiv.org/abs/2604.04356. Per layer, from the first to the last:

1. The experts of the highest REAP scores S_j are centroids, as many as remain.
2. In the order of their scores, each centroid absorbs the C unassigned experts that are most
   like it, until none is left; most centroids absorb none and stay as they are.
   Likeness is the mean of two cosines over all tokens: of outputs, each scaled by the softmax
   of the router's logits, and of the logits themselves.
3. Members are aligned to their centroid and averaged by S_j, router rows too.
4. The next layer is judged on what the merged layers before it return.

C is 16 of 128 experts in the paper, so an eighth of the experts here. Intermediate channels are
aligned by their weights, when the plan is applied; the paper's cost also counts their
activations.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from edgemoe.apply.expert_tensors import plan_tensors
from edgemoe.calibrate.collect import sum_call
from edgemoe.calibrate.saliency import mean_gated_norm
from edgemoe.oracle.reconstruction import token_grams
from edgemoe.plans.plan import LayerPlan, MergedExpert
from edgemoe.prune.selection import router_groups

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from edgemoe.calibrate.task_statistics import TaskStatistics
    from edgemoe.models.shapes import LayerShape, ModelShape
    from edgemoe.oracle.oracle import LayerOracle, LayerView

_ABSORBED = 1 / 8


def ream(
    oracle: LayerOracle,
    statistics: TaskStatistics,
    shape: ModelShape,
    counts: Sequence[int],
    seed: int,
    *,
    tokens: int = 4096,
) -> tuple[LayerPlan, ...]:
    """Merge experts into those of the highest scores, layer after layer.

    Args:
        oracle: The model and the task's tokens.
        statistics: Not used: scores are of the merged model.
        shape: The model.
        counts: Experts that remain per MoE layer.
        seed: Not used: the method has no chance in it.
        tokens: How many tokens to judge on, in [1, inf).

    Returns:
        One plan per MoE layer.
    """
    del statistics, seed
    plans = []
    views = oracle.fewer(tokens).walk("prune (ream)")
    for layer, count, view in zip(shape.layers, counts, views, strict=True):
        scores = mean_gated_norm(
            sum_call(view.layer, view.hidden, view.routing, view.layer.expert_output)
        )
        plan = _merge_layer(layer, scores, likeness(view), count)
        view.go_on_with(plan_tensors(view.layer, plan))
        plans.append(plan)
    return tuple(plans)


def likeness(view: LayerView) -> NDArray[np.float64]:
    """Compare a layer's experts.

    Args:
        view: The layer.

    Returns:
        Means of two cosines, float64 [experts, experts] in [-1, 1].
    """
    logits = view.routing.logits[:, : view.layer.num_experts].double()
    gates = torch.softmax(logits, dim=-1)
    grams = token_grams(view.layer, view.hidden).double()
    outputs = torch.einsum("ti,tij,tj->ij", gates, grams, gates).numpy()
    return (_cosine(outputs) + _cosine((logits.T @ logits).numpy())) / 2


def _cosine(gram: NDArray[np.float64]) -> NDArray[np.float64]:
    norms = np.sqrt(np.diagonal(gram).clip(0))
    scale = np.outer(norms, norms)
    cosine: NDArray[np.float64] = np.divide(
        gram, scale, out=np.zeros_like(gram), where=scale > 0
    )
    return cosine


def _merge_layer(
    layer: LayerShape,
    scores: NDArray[np.float64],
    alike: NDArray[np.float64],
    count: int,
) -> LayerPlan:
    experts: list[MergedExpert] = []
    for group in router_groups(layer):
        order = group[np.argsort(-scores[group], kind="stable")].tolist()
        centroids, left = order[: count // layer.n_group], order[count // layer.n_group :]
        most = max(1, round(len(group) * _ABSORBED))
        # Where centroids are few, each must absorb more for all to find a place.
        most = max(most, -(-len(left) // len(centroids)))
        for centroid in centroids:
            nearest = sorted(left, key=lambda other: (-alike[centroid, other], other))[:most]
            left = [other for other in left if other not in nearest]
            members = (centroid, *nearest)
            weights = tuple(float(scores[member]) for member in members)
            experts.append(
                MergedExpert(
                    members=members,
                    weights=weights if sum(weights) > 0 else None,
                    reference=centroid,
                )
            )
    return LayerPlan(layer=layer.layer, experts=tuple(experts))
