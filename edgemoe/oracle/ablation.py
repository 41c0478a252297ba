"""How much a model's loss rises when one expert is gone.

MoE-I² (https://arxiv.org/abs/2411.01016) calls expert j of layer i as important as ::

    I_ij = sum over the data of L(X, E_i without e_ij)

and layer i as important as sum_j I_ij. Here L is the mean cross-entropy of the next token and
I_ij is by how much it rises above the whole model's, at least 0: what is common to all experts
says nothing about one. The router chooses among the experts that are left; where it cannot do
with one less (equal groups, no expert to spare) the expert's output is zero instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from edgemoe.layerwise.provider import whole_model
from edgemoe.layerwise.replay import from_layer
from edgemoe.oracle.oracle import inputs_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgemoe.models.layers.layer import MoeLayer
    from edgemoe.oracle.oracle import LayerOracle


def loss_increases(oracle: LayerOracle) -> tuple[NDArray[np.float64], ...]:
    """Remove every expert of every layer once.

    Args:
        oracle: The model, in memory whole, and the tokens.

    Returns:
        For each MoE layer I_ij in nats per token, float64 [experts].

    Raises:
        StreamingError: The model is larger than memory.
    """
    indices = [layer.index for layer in oracle.moe.layers]
    # Alone and first: it finds out whether the family can be run layer by layer.
    ((base,),) = oracle.map(losses_without, [None], "measure the loss")
    losses = oracle.map(losses_without, indices, "lose each expert in turn")
    return tuple(np.maximum(0.0, np.array(found) - base) for found in losses)


def losses_without(oracle: LayerOracle, index: int | None) -> list[float]:
    """Remove every expert of one layer once.

    Args:
        oracle: The model, in memory whole, and the tokens, open.
        index: Decoder layer; None to remove none.

    Returns:
        Mean cross-entropy in nats per token, for each expert; one without a layer.

    Raises:
        StreamingError: The model is larger than memory.
    """
    whole_model(oracle.provider, "the loss without an expert")
    if index is None:
        return [loss_from(oracle, len(oracle.provider.layers))]
    (layer,) = (layer for layer in oracle.moe.layers if layer.index == index)
    losses = []
    for expert in range(layer.num_experts):
        with layer.changed(_tensors_without(layer, expert)):
            losses.append(loss_from(oracle, index))
    return losses


def _tensors_without(layer: MoeLayer, expert: int) -> dict[str, torch.Tensor]:
    shape = layer.shape
    if shape.n_group == 1 and shape.num_experts > shape.min_experts:
        return layer.select([other for other in range(layer.num_experts) if other != expert])
    tensors = dict(layer.tensors())
    last = "down_out" if layer.is_factored else "down_proj"
    for name in (f"{layer.spec.experts}.{last}", f"{layer.spec.experts}.down_proj_bias"):
        if name in tensors:
            tensors[name] = tensors[name].clone()
            tensors[name][expert] = 0
    return tensors


def loss_from(oracle: LayerOracle, first: int) -> float:
    """Measure the loss of a model that is changed from one decoder layer on.

    Args:
        oracle: The model, in memory whole, and the tokens, open; what the layers before return
            must have been asked for where they are changed, too.
        first: Decoder layer from which on it is changed.

    Returns:
        Mean cross-entropy in nats per token.

    Raises:
        StreamingError: The family cannot be run layer by layer.
    """
    total, count = 0.0, 0
    states = oracle.states_before(first)
    with from_layer(oracle.moe.model, oracle.provider.layers, first) as finish:
        for window, given in zip(oracle.windows, states, strict=True):
            if len(window.ids) > 1:
                logits = finish(inputs_of(window), given).logits[0, :-1].float()
                targets = torch.tensor(window.ids[1:])
                total += float(nn.functional.cross_entropy(logits, targets, reduction="sum"))
                count += len(targets)
    return total / max(count, 1)
