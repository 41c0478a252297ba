"""uncurl: Unified Clustering based on Router Logits (Sarkar et al., 2024), its merging part.

https://arxiv.org/abs/2409.01483, Algorithm 1. Per MoE layer, from Z experts to D, with H_i the
router logits of expert i over all tokens of the task::

    S_ij = (1 + cos(H_i, H_j)) / 2
    F    = D eigenvectors of the graph Laplacian of S          [Z, D]
    clusters = k-means(F, D)

The paper leaves the Laplacian's normalisation open and cites Ng, Jordan and Weiss (2001), so
theirs is used: zero diagonal, D^-1/2 S D^-1/2, its largest eigenvectors, rows scaled to
length 1. In each cluster the expert that the task's tokens select most often is the
reference; the others' channels are aligned to it and all are averaged by how often each is
selected. Both happen when the plan is applied. The paper then draws the router anew and
trains it on the task; that is another step, and the merged router rows are its start.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgemoe.plans.plan import LayerPlan, MergedExpert
from edgemoe.prune.clustering import cluster_spectrally
from edgemoe.prune.selection import router_groups

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from edgemoe.calibrate.sums import LayerSums
    from edgemoe.calibrate.task_statistics import TaskStatistics
    from edgemoe.models.shapes import LayerShape, ModelShape


def uncurl(
    statistics: TaskStatistics, shape: ModelShape, counts: Sequence[int], seed: int
) -> tuple[LayerPlan, ...]:
    """Merge the experts of each layer whose router logits go together.

    Args:
        statistics: Sums of the task.
        shape: The model.
        counts: Experts that remain per MoE layer.
        seed: Seed of the k-means restarts, in [0, inf).

    Returns:
        One plan per MoE layer.
    """
    return tuple(
        _merge_layer(layer, statistics.layers[layer.layer], count, seed)
        for layer, count in zip(shape.layers, counts, strict=True)
    )


def similarity(logit_gram: NDArray[np.float64]) -> NDArray[np.float64]:
    """Compute S from the logits' Gram matrix.

    Args:
        logit_gram: sum over tokens of H_i H_j, float64 [experts, experts].

    Returns:
        float64 [experts, experts] in [0, 1]; experts without any logit are 1/2 from others.
    """
    norms = np.sqrt(np.diagonal(logit_gram))
    scale = np.outer(norms, norms)
    cosine = np.divide(logit_gram, scale, out=np.zeros_like(logit_gram), where=scale > 0)
    affinity: NDArray[np.float64] = (1 + np.clip(cosine, -1, 1)) / 2
    return affinity


def _merge_layer(layer: LayerShape, sums: LayerSums, count: int, seed: int) -> LayerPlan:
    affinity = similarity(sums.logit_gram)
    experts: list[MergedExpert] = []
    for group in router_groups(layer):
        clusters = count // layer.n_group
        labels = cluster_spectrally(affinity[np.ix_(group, group)], clusters, seed=seed)
        experts += [_merge(group[labels == label], sums.count) for label in range(clusters)]
    return LayerPlan(layer=layer.layer, experts=tuple(experts))


def _merge(members: NDArray[np.int64], count: NDArray[np.float64]) -> MergedExpert:
    selected = count[members]
    return MergedExpert(
        members=tuple(members.tolist()),
        # Experts that the task never selects have no frequency to weigh them by.
        weights=tuple(selected.tolist()) if selected.sum() > 0 else None,
        reference=int(members[np.argmax(selected)]),
    )
