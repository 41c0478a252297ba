"""random: keep experts drawn by chance, the control that every method must beat."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgemoe.prune.selection import keep_highest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgemoe.calibrate.task_statistics import TaskStatistics
    from edgemoe.models.shapes import ModelShape
    from edgemoe.plans.plan import LayerPlan


def random(
    statistics: TaskStatistics, shape: ModelShape, counts: Sequence[int], seed: int
) -> tuple[LayerPlan, ...]:
    """Keep a uniform draw of each layer's experts.

    Args:
        statistics: Not used: the task has no say.
        shape: The model.
        counts: Experts to keep per MoE layer.
        seed: Seed of the draw, in [0, inf). A layer's draw depends on it and the layer's index,
            and a larger count keeps what a smaller one keeps.

    Returns:
        One plan per MoE layer.
    """
    del statistics
    plans = []
    for layer, count in zip(shape.layers, counts, strict=True):
        generator = np.random.Generator(np.random.PCG64([seed, layer.layer]))
        plans.append(keep_highest(layer, generator.random(layer.num_experts), count))
    return tuple(plans)
