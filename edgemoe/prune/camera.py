"""camera: the channels of the highest energy (CAMERA-P, 2025).

https://arxiv.org/abs/2508.02322. A micro-expert i is one intermediate channel of an expert: its
gate row, its up row and its down column w_i. Over the tokens that were routed to the expert,
phi_i is the router's gate times act(gate) * up, and the micro-expert's energy is ::

    E_i = ((1 - alpha) ||phi_i||_2^2 + alpha ||phi_i||_inf^2) * ||w_i||_2^2

Layers are pruned from the first to the last, each judged on what the pruned layers before it
return. The paper ranks all micro-experts of a layer together (`widths=ragged`); since a layer
is stored at the width of its widest expert, the default keeps as many of each expert
(`widths=equal`). `alpha` is 0.9 in the run that the authors publish.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from edgemoe.apply.checks import refuse_width_pruning
from edgemoe.apply.expert_tensors import plan_tensors
from edgemoe.errors import PlanError
from edgemoe.models.layers.width import channel_outputs
from edgemoe.prune.widths import check_choice, keep_equal, keep_ragged

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from edgemoe.calibrate.task_statistics import TaskStatistics
    from edgemoe.models.shapes import ModelShape
    from edgemoe.oracle.oracle import LayerOracle, LayerView
    from edgemoe.plans.plan import LayerPlan

# Tokens of an expert at a time: their hidden units are in memory twice.
_CHUNK = 1024


def camera(
    oracle: LayerOracle,
    statistics: TaskStatistics,
    shape: ModelShape,
    counts: Sequence[int],
    seed: int,
    *,
    alpha: float = 0.9,
    tokens: int = 8192,
    widths: str = "equal",
) -> tuple[LayerPlan, ...]:
    """Keep the channels of the highest energy, layer after layer.

    Args:
        oracle: The model and the task's tokens.
        statistics: Not used: energies are of the pruned model.
        shape: The model.
        counts: Intermediate channels to keep of each expert, on average, per MoE layer.
        seed: Not used: the method has no chance in it.
        alpha: Share of the largest square against the sum of squares, in [0, 1].
        tokens: How many tokens to judge on, in [1, inf).
        widths: `equal`, as many of each expert, or `ragged`, the best of the layer.

    Returns:
        One plan per MoE layer; it keeps all experts.

    Raises:
        PlanError: An option is out of range, or the family's channels cannot be chosen.
    """
    del statistics, seed
    check_choice(widths)
    if not 0 <= alpha <= 1:
        raise PlanError(f"alpha must be in [0, 1], got {alpha}.")
    for layer in oracle.moe.layers:
        refuse_width_pruning(layer, shape.family)
    plans = []
    views = oracle.fewer(tokens).walk("prune (camera)")
    for layer_shape, width, view in zip(shape.layers, counts, views, strict=True):
        found = energies(view, alpha)
        if widths == "equal":
            plan = keep_equal(layer_shape.layer, found, width)
        else:
            plan = keep_ragged(layer_shape.layer, found, width * layer_shape.num_experts)
        view.go_on_with(plan_tensors(view.layer, plan))
        plans.append(plan)
    return tuple(plans)


@torch.no_grad()
def energies(view: LayerView, alpha: float) -> NDArray[np.float64]:
    """Compute the energy of every channel of a layer.

    Args:
        view: The layer.
        alpha: As in `camera`.

    Returns:
        float64 [experts, channels]; 0 for those of an expert that no token reached.
    """
    layer, routing = view.layer, view.routing
    found = np.zeros((layer.num_experts, layer.intermediate_size))
    for expert in range(layer.num_experts):
        tokens, slots = torch.where(routing.indices == expert)
        total = torch.zeros(layer.intermediate_size, dtype=torch.float64)
        largest = torch.zeros_like(total)
        for chunk, slot in zip(
            torch.split(tokens, _CHUNK), torch.split(slots, _CHUNK), strict=True
        ):
            if not len(chunk):
                continue
            units = layer.expert_units(expert, view.hidden[chunk]).double()
            squares = (units * routing.weights[chunk, slot, None].double()).square()
            total += squares.sum(dim=0)
            largest = torch.maximum(largest, squares.amax(dim=0))
        columns = channel_outputs(layer, expert).double().square().sum(dim=0)
        found[expert] = (((1 - alpha) * total + alpha * largest) * columns).numpy()
    return found
