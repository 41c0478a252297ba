"""heapr: the neurons whose absence raises the loss least (HEAPr, 2025).

https://arxiv.org/abs/2509.22299. An atomic expert k is one intermediate neuron of an expert:
its gate row, its up row and its down column w_k. With h_k, what the down projection is given,
and g, the gradient of the loss at the expert's output, its importance is ::

    s_k = E[h_k^2] * (w_k^T M w_k)      M = E[g g^T]

with expectations over the calibration tokens, 0 for a token that was not routed to the expert.
Since w_k^T M w_k = E[(g . w_k)^2], no matrix M is kept: what is summed has one number for each
neuron. The loss is the cross-entropy of the next token; the weights have no gradient.

The paper ranks all neurons of all layers together. How many each layer keeps is taken from that
order; since a layer is stored at the width of its widest expert, the default then keeps as many
of each expert (`widths=equal`), and `widths=ragged` is the order itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from edgemoe.apply.checks import refuse_width_pruning
from edgemoe.layerwise.provider import whole_model
from edgemoe.models.layers.width import channel_outputs
from edgemoe.models.loading import quiet_transformers
from edgemoe.oracle.gradients import take_gradients
from edgemoe.progress import track
from edgemoe.prune.widths import check_choice, keep_equal, keep_ragged, share_widths

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from edgemoe.calibrate.sample import Window
    from edgemoe.calibrate.task_statistics import TaskStatistics
    from edgemoe.models.contract import MoeModel
    from edgemoe.models.shapes import ModelShape
    from edgemoe.oracle.gradients import LayerGradient
    from edgemoe.oracle.oracle import LayerOracle
    from edgemoe.plans.plan import LayerPlan


def heapr(
    oracle: LayerOracle,
    statistics: TaskStatistics,
    shape: ModelShape,
    counts: Sequence[int],
    seed: int,
    *,
    tokens: int = 8192,
    widths: str = "equal",
) -> tuple[LayerPlan, ...]:
    """Keep the neurons of the highest importance of the whole model.

    Args:
        oracle: The model, in memory as a whole, and the task's tokens.
        statistics: Not used.
        shape: The model.
        counts: Neurons to keep of each expert, on average, per MoE layer; only their total over
            all experts matters.
        seed: Not used: the method has no chance in it.
        tokens: How many tokens to judge on, in [1, inf).
        widths: `equal`, as many of each expert of a layer, or `ragged`, the best of all.

    Returns:
        One plan per MoE layer; it keeps all experts.

    Raises:
        PlanError: An option is out of range, or the family's neurons cannot be chosen.
        StreamingError: The model is larger than memory: gradients go through all of it.
    """
    del statistics, seed
    check_choice(widths)
    whole_model(oracle.provider, "heapr, which takes gradients through it,")
    for layer in oracle.moe.layers:
        refuse_width_pruning(layer, shape.family)
    scores = oracle.once(
        ("heapr", tokens), lambda: importances(oracle.moe, oracle.fewer(tokens).windows)
    )
    experts = shape.experts_per_layer
    total = sum(width * count for width, count in zip(counts, experts, strict=True))
    shares = _shares(scores, total)
    indices = [layer.layer for layer in shape.layers]
    if widths == "ragged":
        return tuple(map(keep_ragged, indices, scores, shares))
    wanted = [share / count for share, count in zip(shares, experts, strict=True)]
    return tuple(
        map(keep_equal, indices, scores, share_widths(wanted, shape.widths_per_layer, experts))
    )


def importances(model: MoeModel, windows: Sequence[Window]) -> list[NDArray[np.float64]]:
    """Compute the importance of every neuron.

    Args:
        model: The model, in memory as a whole; it is as before when this returns.
        windows: The tokens, a forward and a backward pass each.

    Returns:
        Per MoE layer s_k, float64 [experts, neurons].
    """
    shapes = [(layer.num_experts, layer.intermediate_size) for layer in model.layers]
    inputs = [torch.zeros(shape, dtype=torch.float64) for shape in shapes]
    gradients = [torch.zeros(shape, dtype=torch.float64) for shape in shapes]
    seen = 0
    with quiet_transformers():
        for window in track(windows, "prune (heapr)"):
            seen += len(window.ids)
            if len(window.ids) < 2:
                continue
            for number, call in enumerate(take_gradients(model, window)):
                _add(call, inputs[number], gradients[number])
    pairs = zip(inputs, gradients, strict=True)
    return [(h / seen * (g / seen)).numpy() for h, g in pairs]


@torch.no_grad()
def _add(call: LayerGradient, inputs: torch.Tensor, gradients: torch.Tensor) -> None:
    """Add the squares of a pass: of h_k, and of g . w_k."""
    layer = call.layer
    for expert in range(layer.num_experts):
        tokens, slots = torch.where(call.routing.indices == expert)
        if not len(tokens):
            continue
        units = layer.expert_units(expert, call.hidden[tokens]).double()
        inputs[expert] += units.square().sum(dim=0)
        # The layer's output has the expert's times its gate in it.
        gates = call.routing.weights[tokens, slots, None].double()
        at_output = call.gradient[tokens].double() * gates
        columns = channel_outputs(layer, expert).double()
        gradients[expert] += (at_output @ columns).square().sum(dim=0)


def _shares(scores: Sequence[NDArray[np.float64]], total: int) -> list[int]:
    """Count how many neurons of each layer are among the best of all."""
    owners = np.concatenate(
        [np.full(layer.size, number) for number, layer in enumerate(scores)]
    )
    order = np.argsort(-np.concatenate([layer.ravel() for layer in scores]), kind="stable")
    counts = np.bincount(owners[order[:total]], minlength=len(scores))
    return [int(count) for count in counts]
