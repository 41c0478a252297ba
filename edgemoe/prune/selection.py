"""From a score per expert to the experts that stay: what the dropping methods share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgemoe.plans.plan import LayerPlan, MergedExpert

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from edgemoe.calibrate.sums import LayerSums
    from edgemoe.calibrate.task_statistics import TaskStatistics
    from edgemoe.models.shapes import LayerShape, ModelShape


def keep_by_score(
    statistics: TaskStatistics,
    shape: ModelShape,
    counts: Sequence[int],
    score: Callable[[LayerSums], NDArray[np.float64]],
) -> tuple[LayerPlan, ...]:
    """Keep the experts of the highest scores of every layer.

    Args:
        statistics: Sums of the task.
        shape: The model.
        counts: Experts to keep per MoE layer.
        score: Gives a layer's scores, float64 [experts], from its sums.

    Returns:
        One plan per MoE layer.
    """
    return tuple(
        keep_highest(layer, score(statistics.layers[layer.layer]), count)
        for layer, count in zip(shape.layers, counts, strict=True)
    )


def keep_highest(layer: LayerShape, scores: NDArray[np.float64], count: int) -> LayerPlan:
    """Keep the experts of the highest scores, as many of each router group.

    Args:
        layer: The layer.
        scores: float64 [experts].
        count: Experts to keep, a multiple of the layer's router groups.

    Returns:
        The layer's plan. Of experts with equal scores those of lower id stay.
    """
    kept: list[int] = []
    for group in router_groups(layer):
        order = np.argsort(-scores[group], kind="stable")
        kept += group[order[: count // layer.n_group]].tolist()
    return keep_set(layer, kept)


def keep_set(layer: LayerShape, kept: Sequence[int]) -> LayerPlan:
    """Plan to keep some experts.

    Args:
        layer: The layer.
        kept: Their ids.

    Returns:
        The plan.
    """
    experts = tuple(MergedExpert(members=(expert,)) for expert in kept)
    return LayerPlan(layer=layer.layer, experts=experts)


def router_groups(layer: LayerShape) -> list[NDArray[np.int64]]:
    """List the ids of each router group; most routers have one group.

    Args:
        layer: The layer.

    Returns:
        Ids per group, int64 [experts / groups] each.
    """
    return list(np.arange(layer.num_experts).reshape(layer.n_group, -1))
