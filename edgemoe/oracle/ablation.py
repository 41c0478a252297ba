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

from edgemoe.models.checkpoint import quiet_transformers
from edgemoe.models.replay import only_head
from edgemoe.oracle.homes import whole_model
from edgemoe.oracle.oracle import inputs_of
from edgemoe.progress import counting

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from edgemoe.models.layer import MoeLayer
    from edgemoe.models.replay import Outputs
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
    whole_model(oracle.home, "the loss without an expert")
    by_index = {layer.index: layer for layer in oracle.moe.layers}
    depth = len(oracle.home.layers)
    trials = sum(layer.num_experts for layer in oracle.moe.layers)
    found: dict[int, NDArray[np.float64]] = {}
    with quiet_transformers(), counting(trials, "lose each expert in turn") as done:
        states: list[list[Outputs]] = [[None] * len(oracle.windows)]
        for index in range(depth):
            states.append(oracle.run_layer(index, states[-1]))
        base = _loss(oracle, states[-1])
        for index, layer in by_index.items():
            found[index] = np.zeros(layer.num_experts)
            for expert in range(layer.num_experts):
                loss = _loss_without(oracle, layer, expert, states)
                found[index][expert] = max(0.0, loss - base)
                done()
    return tuple(found[layer.index] for layer in oracle.moe.layers)


def _loss_without(
    oracle: LayerOracle, layer: MoeLayer, expert: int, states: Sequence[list[Outputs]]
) -> float:
    with layer.changed(_tensors_without(layer, expert)):
        current = oracle.run_layer(layer.index, states[layer.index])
    for index in range(layer.index + 1, len(oracle.home.layers)):
        current = oracle.run_layer(index, current)
    return _loss(oracle, current)


def _tensors_without(layer: MoeLayer, expert: int) -> dict[str, torch.Tensor]:
    shape = layer.shape
    if shape.n_group == 1 and shape.num_experts > shape.min_experts:
        return layer.select([other for other in range(layer.num_experts) if other != expert])
    tensors = dict(layer.tensors())
    last = "down_out" if layer.is_factored else "down_proj"
    for name in (f"{layer.facts.experts}.{last}", f"{layer.facts.experts}.down_proj_bias"):
        if name in tensors:
            tensors[name] = tensors[name].clone()
            tensors[name][expert] = 0
    return tensors


def _loss(oracle: LayerOracle, states: Sequence[Outputs]) -> float:
    total, count = 0.0, 0
    with only_head(oracle.moe.model, oracle.home.layers) as finish:
        for window, given in zip(oracle.windows, states, strict=True):
            if len(window.ids) > 1:
                logits = finish(inputs_of(window), given).logits[0, :-1].float()
                targets = torch.tensor(window.ids[1:])
                total += float(nn.functional.cross_entropy(logits, targets, reduction="sum"))
                count += len(targets)
    return total / max(count, 1)
