"""Proximal policy optimisation of the heads: the second step of Ada-K's training.

Every MoE layer is an agent (https://arxiv.org/abs/2410.10456, section 3.3). For token i, layer
l of L draws the number k_il from P_il = softmax(W_l x_il + b_l). What all layers get for it is
how much likelier the next token became than with the router's own top-k, a baseline instead of
a value network::

    A_il = gamma^(L - l) (log p(next | drawn numbers) - log p(next | top-k))

of which the mean over the drawn tokens is taken off: that changes no gradient in the mean, and
takes noise out of it. With P' the heads as they were when numbers were drawn, heads are changed
to minimise, over a few passes per draw::

    - mean_il min(r A, clip(r, 1 - eps, 1 + eps) A) + lambda mean_il sum_n n P_il(n),
      r = P_il(k_il) / P'_il(k_il)
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from edgemoe.allocate.heads import mean_number
from edgemoe.allocate.rollout import draw, reward_of
from edgemoe.errors import AllocationError
from edgemoe.progress import telling

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgemoe.allocate.heads import Heads
    from edgemoe.allocate.rollout import Rollout
    from edgemoe.calibrate.sample import Window
    from edgemoe.models.contract import MoeModel
    from edgemoe.recover.state import TrainingState

_DECAY = 0.1
CHECKPOINT_SECONDS = 10.0
# By how much an expert too many makes experts dearer, step by step.
_FOLLOW = 0.1


@dataclass(frozen=True, kw_only=True)
class PpoOptions:
    """Hyperparameters of PPO.

    Attributes:
        steps: Draws.
        batch_tokens: Tokens of each.
        passes: Changes of the heads after each draw.
        learning_rate: Of AdamW.
        clip: eps.
        gamma: What a later layer's share of the advantage is divided by, per layer.
        regulariser: lambda, at the beginning.
        mean_k: Experts per token and layer that lambda follows; None keeps lambda.
        seed: Of windows and numbers.
    """

    steps: int
    batch_tokens: int
    passes: int
    learning_rate: float
    clip: float
    gamma: float
    regulariser: float
    mean_k: float | None
    seed: int


def train(
    model: MoeModel,
    windows: Sequence[Window],
    heads: Heads,
    options: PpoOptions,
    state: TrainingState | None = None,
    *,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
) -> None:
    """Train heads, from where the state is.

    Args:
        model: The model, without a policy; it is not changed.
        windows: Tokens of the task.
        heads: The heads; they are changed.
        options: How.
        state: Where the training is kept; None keeps it nowhere.
        checkpoint_seconds: How long a run may lose when it is killed.

    Raises:
        AllocationError: No window has two tokens, or the model answers NaN or infinity.
    """
    known = [window for window in windows if len(window.ids) > 1]
    if not known:
        raise AllocationError("ada-k must read two tokens of a line or more, got none.")
    parameters = {"heads": heads.weight}
    optimizer = torch.optim.AdamW([heads.weight], lr=options.learning_rate, weight_decay=_DECAY)
    progress: dict[str, Any] = {"step": 0, "regulariser": options.regulariser}
    if state is not None and state.progress:
        progress = dict(state.progress)
        state.load(parameters, optimizer)
    elif state is not None:
        state.save(progress, parameters, optimizer)
    baselines: dict[int, torch.Tensor] = {}
    saved = time.monotonic()
    with telling(options.steps - progress["step"], "train allocators") as tell:
        while progress["step"] < options.steps:
            step = progress["step"]
            chosen = choose(known, options.batch_tokens, [options.seed, step])
            random = torch.Generator().manual_seed((options.seed << 32) + step)
            batch = [known[number] for number in chosen]
            rollout = draw(model, batch, heads, random)
            for number in chosen:
                if number not in baselines:
                    baselines[number] = reward_of(model, [known[number]])
            gained = rollout.rewards - torch.cat([baselines[number] for number in chosen])
            if not bool(torch.isfinite(gained).all()):
                raise AllocationError(
                    f"the model must answer numbers, got NaN or infinity at step {step}."
                )
            weight = progress["regulariser"]
            improve(heads, rollout, gained, optimizer, weight, options)
            mean = float(rollout.numbers.float().mean()) + 1
            if options.mean_k is not None:
                weight *= math.exp(_FOLLOW * (mean - options.mean_k))
            progress |= {"step": step + 1, "regulariser": weight}
            tell(f"{mean:.2f} experts, {gained.mean():+.3f} nats")
            is_late = time.monotonic() - saved >= checkpoint_seconds
            if state is not None and (is_late or step + 1 == options.steps):
                state.save(progress, parameters, optimizer)
                saved = time.monotonic()


def choose(windows: Sequence[Window], tokens: int, seed: Sequence[int]) -> list[int]:
    """Draw windows without repetition until they have enough tokens.

    Args:
        windows: All of them.
        tokens: How many are enough; the last window may have more.
        seed: Of the draw.

    Returns:
        Their places.
    """
    order = np.random.Generator(np.random.PCG64(list(seed))).permutation(len(windows))
    chosen: list[int] = []
    for place in order.tolist():
        chosen.append(place)
        tokens -= len(windows[place].ids)
        if tokens <= 0:
            break
    return chosen


def improve(
    heads: Heads,
    rollout: Rollout,
    gained: torch.Tensor,
    optimizer: torch.optim.Optimizer,
    weight: float,
    options: PpoOptions,
) -> None:
    """Change heads after one draw.

    Args:
        heads: The heads; they are changed.
        rollout: What was drawn.
        gained: Rewards above the baseline's, float32 [tokens], of any mean.
        optimizer: Of the heads.
        weight: lambda.
        options: How.
    """
    layers = len(heads.slots)
    shares = options.gamma ** torch.arange(layers - 1, -1, -1, dtype=torch.float32)
    # What all tokens have in common says nothing of one number against another: it is noise.
    advantages = shares[:, None] * (gained - gained.mean())
    drawn = rollout.numbers[..., None]
    with torch.no_grad():
        before = heads.log_probabilities(rollout.states).gather(-1, drawn)[..., 0]
    for _ in range(options.passes):
        optimizer.zero_grad()
        loss = loss_of(heads, rollout, advantages, before, weight, options.clip)
        torch.autograd.backward(loss)
        optimizer.step()


def loss_of(
    heads: Heads,
    rollout: Rollout,
    advantages: torch.Tensor,
    before: torch.Tensor,
    weight: float,
    clip: float,
) -> torch.Tensor:
    """Compute what heads are to minimise.

    Args:
        heads: The heads.
        rollout: What was drawn.
        advantages: A, float32 [layers, tokens].
        before: log P' of the drawn numbers, float32 [layers, tokens].
        weight: lambda.
        clip: eps.

    Returns:
        The loss, a scalar with a gradient.
    """
    likely = heads.log_probabilities(rollout.states)
    ratio = (likely.gather(-1, rollout.numbers[..., None])[..., 0] - before).exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    gain = torch.minimum(ratio * advantages, clipped * advantages).mean()
    return weight * mean_number(likely).mean() - gain
