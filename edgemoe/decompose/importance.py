"""How important each expert is that a plan keeps: I_ij of MoE-I²'s rank rule.

MoE-I² (https://arxiv.org/abs/2411.01016) measures the rise of the loss without the expert. Two
scores from statistics stand in for it without running the model. An expert that is merged is as
important as its members together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgemoe.calibrate.saliency import mean_gated_norm
from edgemoe.errors import PlanError
from edgemoe.oracle.ablation import loss_increases

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

    from edgemoe.calibrate.task_statistics import TaskStatistics
    from edgemoe.oracle.oracle import LayerOracle
    from edgemoe.plans.plan import Plan

CHOICES = ("uniform", "frequency", "reap", "loss")


def expert_importance(
    choice: str,
    plan: Plan,
    statistics: TaskStatistics,
    open_oracle: Callable[[], LayerOracle],
) -> tuple[tuple[float, ...], ...]:
    """Judge the experts of every layer.

    Args:
        choice: `uniform`: all alike; `frequency`: tokens that are routed to the expert;
            `reap`: mean gated norm of its output; `loss`: rise of the loss without it.
        plan: What is kept and merged.
        statistics: Sums of the task.
        open_oracle: Opens the model, for `loss`.

    Returns:
        Of each MoE layer one number per kept expert, in [0, inf).

    Raises:
        PlanError: There is no such choice.
        StreamingError: `loss` is asked for, and the model is larger than memory.
    """
    if choice not in CHOICES:
        raise PlanError(f"importance must be one of {', '.join(CHOICES)}, got {choice!r}.")
    if choice == "uniform":
        return tuple((1.0,) * len(layer.experts) for layer in plan.layers)
    scores: dict[int, NDArray[np.float64]]
    sums = statistics.layers
    if choice == "frequency":
        scores = {index: layer.count for index, layer in sums.items()}
    elif choice == "reap":
        scores = {index: mean_gated_norm(layer) for index, layer in sums.items()}
    else:
        oracle = open_oracle()
        indices = [layer.index for layer in oracle.moe.layers]
        scores = dict(zip(indices, loss_increases(oracle), strict=True))
    return tuple(
        tuple(
            float(sum(scores[layer.layer][member] for member in expert.members))
            for expert in layer.experts
        )
        for layer in plan.layers
    )
