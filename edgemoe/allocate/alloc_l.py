"""alloc-l: each layer as many experts per token as it needs, within what there is to spend.

A layer's need is how the perplexity rises when it has fewer, with all deeper layers held at
one expert, so that what they would make up for is seen::

    S[l, k] = PPL(layers before l at their own top_k, layer l at k, layers after l at 1)
    k* = argmin sum_l S[l, k_l]   subject to   sum_l k_l = B,  1 <= k_l <= K_l

(Alloc-MoE, https://arxiv.org/abs/2604.08133, "Alloc-L"), solved exactly by dynamic programming.
The paper's second step, which moves experts between the tokens of a batch, is left out: what a
token gets would depend on the tokens that it comes with.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from edgemoe.allocate.budget import check_tokens, default_mean, spend
from edgemoe.errors import AllocationError
from edgemoe.k_rule import KRule
from edgemoe.models.hooks import limit_k
from edgemoe.oracle.ablation import loss_from

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from edgemoe.oracle.oracle import LayerOracle

_DEEPER = ("one", "all")
_MOST_NATS = 700.0  # exp of more is infinite


def alloc_l(
    oracle: LayerOracle,
    mean_k: float | None,
    seed: int,
    *,
    tokens: int = 1024,
    deeper: str = "one",
) -> tuple[KRule, ...]:
    """Share experts out over layers.

    Args:
        oracle: The model, in memory whole, and the task's tokens.
        mean_k: Experts per token and layer, in [1, top_k]; two thirds of top_k where it is
            None.
        seed: Not used.
        tokens: How many tokens measure the need.
        deeper: What deeper layers use meanwhile: `one` expert, as in the paper, or `all` of
            theirs.

    Returns:
        A rule for each MoE layer, with what was measured.

    Raises:
        AllocationError: The mean or an option is out of range, no line has two tokens, or a
            perplexity is not finite.
        StreamingError: The model is larger than memory, or cannot be run layer by layer.
    """
    del seed
    if deeper not in _DEEPER:
        raise AllocationError(f"deeper must be one of {', '.join(_DEEPER)}, got {deeper!r}.")
    check_tokens(tokens)
    layers = oracle.moe.layers
    most = [layer.slots for layer in layers]
    budget = spend(default_mean(layers) if mean_k is None else mean_k, most)
    jobs = [(layer.index, deeper) for layer in layers]

    def measure() -> list[list[float]]:
        fewer = oracle.fewer(tokens)
        if not any(len(window.ids) > 1 for window in fewer.windows):
            raise AllocationError("alloc-l must read two tokens of a line or more, got none.")
        return fewer.map(perplexities_with, jobs, "limit each layer in turn")

    needs = oracle.once(("alloc-l", tokens, deeper), measure)
    counts = share_out(needs, budget)
    return tuple(
        KRule(slots=count, needs=tuple(need)) for count, need in zip(counts, needs, strict=True)
    )


def perplexities_with(oracle: LayerOracle, job: tuple[int, str]) -> list[float]:
    """Limit one layer to each number of experts in turn.

    Args:
        oracle: The model, in memory whole, and the tokens, open.
        job: Decoder layer, and what deeper layers use.

    Returns:
        S[l, k] for k from 1 to the layer's own number.

    Raises:
        AllocationError: A perplexity is not finite.
        StreamingError: The model is larger than memory.
    """
    index, deeper = job
    layers = oracle.moe.layers
    place = next(number for number, layer in enumerate(layers) if layer.index == index)
    own = [layer.slots for layer in layers]
    after = [1] * (len(layers) - place - 1) if deeper == "one" else own[place + 1 :]
    found = []
    oracle.states_before(index)
    for k in range(1, own[place] + 1):
        with limit_k(oracle.moe, [*own[:place], k, *after]):
            loss = loss_from(oracle, index)
        if not loss < _MOST_NATS:
            raise AllocationError(
                f"the model must have a finite perplexity, got {loss:g} nats per token with "
                f"{k} experts in layer {index}."
            )
        found.append(math.exp(loss))
    return found


def share_out(needs: Sequence[Sequence[float]], budget: int) -> list[int]:
    """Spend a budget so that the sum of needs is smallest.

    Args:
        needs: S[l, k] for each layer l, k from 1 on; finite.
        budget: Sum of all k, at least one for each layer and no more than there are numbers.

    Returns:
        k for each layer; of equally good ones the one whose last layers have most.
    """
    best = np.full((len(needs) + 1, budget + 1), math.inf)
    best[0, 0] = 0.0
    chosen: NDArray[np.int64] = np.zeros((len(needs), budget + 1), np.int64)
    for number, need in enumerate(needs):
        for k, value in enumerate(need, start=1):
            if k > budget:
                break
            trial = np.full(budget + 1, math.inf)
            trial[k:] = best[number, : budget + 1 - k] + value
            better = trial <= best[number + 1]
            better &= np.isfinite(trial)
            best[number + 1][better] = trial[better]
            chosen[number][better] = k
    counts: list[int] = []
    left = budget
    for number in reversed(range(len(needs))):
        counts.append(int(chosen[number, left]))
        left -= counts[-1]
    return counts[::-1]
