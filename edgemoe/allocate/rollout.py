"""Run a model with numbers of experts that are drawn, and see what comes of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from edgemoe.evaluate.batches import BATCH_TOKENS, pad
from edgemoe.k_policy import KPolicy
from edgemoe.k_rule import KRule, score_numbers
from edgemoe.models.k_policy import following

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from edgemoe.allocate.heads import Heads
    from edgemoe.calibrate.sample import Window
    from edgemoe.models.contract import MoeModel


@dataclass(frozen=True)
class Rollout:
    """Numbers of experts drawn for tokens, and how likely the next tokens were with them.

    Tokens are those of all windows but the last of each, whose next token nobody knows.

    Attributes:
        states: What the routers saw, float32 [layers, tokens, hidden].
        numbers: Experts that were drawn, less one, int64 [layers, tokens].
        rewards: log p(next token), float32 [tokens].
    """

    states: torch.Tensor
    numbers: torch.Tensor
    rewards: torch.Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class _Watched(KRule):
    """A rule that remembers what it saw, and may be told what to answer."""

    decide: Callable[[torch.Tensor], torch.Tensor | int]
    seen: list[torch.Tensor] = field(default_factory=list)
    answers: list[torch.Tensor] = field(default_factory=list)

    def limit(self, hidden: torch.Tensor) -> torch.Tensor | int:
        answer = self.decide(hidden)
        self.seen.append(hidden.float())
        if isinstance(answer, torch.Tensor):
            self.answers.append(answer[:, 0])
        return answer


def draw(
    model: MoeModel, windows: Sequence[Window], heads: Heads, generator: torch.Generator
) -> Rollout:
    """Run windows with numbers that heads draw.

    Args:
        model: The model, without a policy.
        windows: Tokens, two or more in each.
        heads: The heads.
        generator: Draws.

    Returns:
        What came of it.
    """
    weight = heads.weight.detach()

    def rule(layer: int, slots: int) -> _Watched:
        def decide(hidden: torch.Tensor) -> torch.Tensor:
            scores = score_numbers(hidden, weight[layer, :slots])
            likely = torch.softmax(scores, dim=-1)
            return torch.multinomial(likely, 1, generator=generator) + 1

        return _Watched(slots=slots, decide=decide)

    rules = tuple(rule(layer, slots) for layer, slots in enumerate(heads.slots))
    rewards, real = _run(model, windows, rules)
    return Rollout(
        states=torch.stack([torch.cat(rule.seen)[real] for rule in rules]),
        numbers=torch.stack([torch.cat(rule.answers)[real] for rule in rules]) - 1,
        rewards=rewards,
    )


def reward_of(model: MoeModel, windows: Sequence[Window]) -> torch.Tensor:
    """Return log p(next token) with the model's own numbers of experts.

    Args:
        model: The model.
        windows: Tokens, two or more in each.

    Returns:
        float32 [tokens], in the order of `Rollout`.
    """
    return _run(model, windows, None)[0]


def see_states(model: MoeModel, windows: Sequence[Window]) -> torch.Tensor:
    """Run windows with the model's own numbers, and keep what routers see.

    Args:
        model: The model, without a policy.
        windows: Tokens.

    Returns:
        float32 [layers, tokens, hidden]; tokens of all windows, in order.
    """

    def rule(top_k: int) -> _Watched:
        return _Watched(slots=top_k, decide=lambda _: top_k)

    rules = tuple(rule(layer.top_k) for layer in model.layers)
    decoder = model.model.base_model
    with torch.inference_mode(), following(model, _policy(model, rules)):
        for window in windows:
            decoder(input_ids=torch.tensor([window.ids]), use_cache=False)
    return torch.stack([torch.cat(rule.seen).clone() for rule in rules])


def _policy(model: MoeModel, rules: Sequence[KRule]) -> KPolicy:
    layers = tuple(layer.index for layer in model.layers)
    return KPolicy(name="ada-k", layers=layers, rules=tuple(rules))


@torch.no_grad()
def _run(
    model: MoeModel, windows: Sequence[Window], rules: Sequence[KRule] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rewards, and which of the tokens that passed the layers they are of."""
    policy = model.k_policy if rules is None else _policy(model, rules)
    rewards, real = [], []
    with following(model, policy):
        for batch in _batches(windows):
            ids = pad([window.ids for window in batch])
            logits = model.model(input_ids=ids, use_cache=False).logits
            lengths = torch.tensor([len(window.ids) for window in batch])
            counts = torch.arange(ids.shape[1]) < lengths[:, None] - 1
            real.append(counts.flatten())
            for row, window in zip(logits, batch, strict=True):
                known = row[: len(window.ids) - 1].float()
                targets = torch.tensor(window.ids[1:])[:, None]
                chosen = known.gather(1, targets)[:, 0]
                rewards.append(chosen - known.logsumexp(dim=-1))
    return torch.cat(rewards), torch.cat(real)


def _batches(windows: Sequence[Window]) -> list[list[Window]]:
    """Put windows together, in their order, while padded they are few tokens."""
    batches: list[list[Window]] = []
    for window in windows:
        longest = len(window.ids)
        if batches:
            longest = max(longest, *(len(other.ids) for other in batches[-1]))
        if batches and longest * (len(batches[-1]) + 1) <= BATCH_TOKENS:
            batches[-1].append(window)
        else:
            batches.append([window])
    return batches
