"""Where the heads of Ada-K begin: the first of the two steps of their training.

- P-Warm, of the paper (https://arxiv.org/abs/2410.10456): for token i

      n_i(p) = min { n : the n best experts have at least p of the router probability }

  with p such that the mean of n_i is what is asked; heads are trained by cross-entropy.
- by costs: heads foresee what numbers of experts cost a token (`edgemoe.allocate.costs`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional

from edgemoe.allocate.costs import fit_heads
from edgemoe.allocate.cumulative import cumulative_of, find_share
from edgemoe.allocate.rollout import see_states
from edgemoe.progress import telling

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgemoe.allocate.heads import Heads
    from edgemoe.oracle.oracle import LayerOracle

_BATCH_TOKENS = 256
_DECAY = 0.1
# How likely the most likely number is, in the mean, where costs tell no more than an order: PPO
# has to draw others now and then.
_LIKELY = 0.7


def warm_up(
    oracle: LayerOracle,
    heads: Heads,
    mean_k: float,
    *,
    epochs: int,
    learning_rate: float,
    seed: int,
) -> float:
    """Train heads to do what a share of the router probability does.

    Args:
        oracle: The model, following no policy, and the tokens.
        heads: The heads; they are changed.
        mean_k: Experts per token and layer that the share is chosen for.
        epochs: Passes over the tokens.
        learning_rate: Of AdamW, at the beginning; half a cosine leads to 0.
        seed: Of the order of tokens.

    Returns:
        The share.

    Raises:
        AllocationError: A router follows no known rule.
        StreamingError: The family cannot be run layer by layer.
    """
    cumulative = cumulative_of(oracle, heads.slots)
    share = find_share(cumulative, mean_k)
    wanted = (
        torch.from_numpy(np.stack([(layer < share).sum(axis=1) for layer in cumulative])) - 1
    )
    inputs = see_states(oracle.moe, oracle.windows)
    _fit(heads, inputs, wanted, epochs, learning_rate, seed)
    return share


def warm_up_by_costs(
    oracle: LayerOracle, heads: Heads, mean_k: float, *, tokens: int, fitted_tokens: int
) -> None:
    """Start heads from what numbers of experts cost.

    Args:
        oracle: The model, in memory whole and following no policy, and the tokens.
        heads: The heads; they are changed.
        mean_k: Mean of their most likely numbers afterwards.
        tokens: How many tokens that is found on.
        fitted_tokens: How many tokens costs are measured on.

    Raises:
        AllocationError: A router follows no known rule, or the model answers NaN or infinity.
        StreamingError: The model is larger than memory.
    """
    fitted = fit_heads(oracle, heads.slots, "ada-k with warm=fisher", tokens=fitted_tokens)
    with torch.no_grad():
        heads.weight.copy_(fitted.weight)
    states = see_states(oracle.moe, oracle.fewer(tokens).windows)
    heads.tilt(states, mean_k)
    heads.sharpen(states, _LIKELY)


def _fit(
    heads: Heads,
    inputs: torch.Tensor,
    wanted: torch.Tensor,
    epochs: int,
    learning_rate: float,
    seed: int,
) -> None:
    """Train by cross-entropy; inputs [layers, tokens, hidden], wanted [layers, tokens]."""
    optimizer = torch.optim.AdamW([heads.weight], lr=learning_rate, weight_decay=_DECAY)
    tokens = inputs.shape[1]
    steps = epochs * -(-tokens // _BATCH_TOKENS)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    draw = torch.Generator().manual_seed(seed)
    with telling(epochs, "warm up") as tell:
        for _ in range(epochs):
            losses: list[float] = []
            order = torch.randperm(tokens, generator=draw)
            for chosen in _batches(order):
                found = heads.log_probabilities(inputs[:, chosen])
                loss = functional.nll_loss(
                    found.flatten(0, 1), wanted[:, chosen].flatten(), reduction="mean"
                )
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
                schedule.step()
                losses.append(loss.item())
            tell(f"cross-entropy {np.mean(losses):.3f}")


def _batches(order: torch.Tensor) -> Sequence[torch.Tensor]:
    return torch.split(order, _BATCH_TOKENS)
