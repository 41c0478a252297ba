"""The linear heads of all layers, as one tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from edgemoe.k_rule import KRule

if TYPE_CHECKING:
    from collections.abc import Sequence


_DEAREST = 64.0
_SHARPEST = 12.0
_BISECTIONS = 50


@dataclass(frozen=True)
class Heads:
    """Heads of the MoE layers.

    Attributes:
        weight: Rows of each layer, the last column a bias, float32 [layers, slots, hidden + 1];
            those beyond a layer's own slots are not used.
        slots: Most experts of a token in each layer.
    """

    weight: nn.Parameter
    slots: tuple[int, ...]

    @classmethod
    def zeros(cls, slots: Sequence[int], hidden: int) -> Heads:
        """Make heads that find all numbers equally likely.

        Args:
            slots: Most experts of a token in each layer.
            hidden: Width of what the routers see.

        Returns:
            The heads.
        """
        return cls(nn.Parameter(torch.zeros(len(slots), max(slots), hidden + 1)), tuple(slots))

    def log_probabilities(self, states: torch.Tensor) -> torch.Tensor:
        """Compute the log-probability of each number of experts.

        Args:
            states: What the routers see, float32 [layers, tokens, hidden].

        Returns:
            float32 [layers, tokens, slots]; minus infinity beyond a layer's own slots.
        """
        scores = torch.einsum("lth,lsh->lts", states, self.weight[..., :-1])
        scores = scores + self.weight[:, None, :, -1]
        most = torch.tensor(self.slots, device=scores.device)[:, None, None]
        beyond = torch.arange(scores.shape[-1], device=scores.device) >= most
        return torch.log_softmax(scores.masked_fill(beyond, float("-inf")), dim=-1)

    @torch.no_grad()
    def tilt(self, states: torch.Tensor, mean_k: float) -> float:
        """Make every expert so much dearer, or cheaper, that tokens use as many as asked.

        A number times the number of experts is added to each score, the same for all layers, so
        what tokens and layers want beside others stays.

        Args:
            states: What the routers see, float32 [layers, tokens, hidden].
            mean_k: Experts per token and layer.

        Returns:
            What was added per expert; the mean of the most likely numbers is then at most
            `mean_k`, and as near as ties allow.
        """
        likely = self.log_probabilities(states)
        numbers = torch.arange(1, likely.shape[-1] + 1, device=likely.device)

        def mean_with(price: float) -> float:
            return float((likely + price * numbers).argmax(dim=-1).float().mean()) + 1

        low, high = -_DEAREST, _DEAREST
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            if mean_with(middle) > mean_k:
                high = middle
            else:
                low = middle
        self.weight[..., -1] += low * numbers
        return low

    @torch.no_grad()
    def sharpen(self, states: torch.Tensor, likely: float) -> None:
        """Multiply all scores by one number: what is most likely stays so.

        Args:
            states: What the routers see, float32 [layers, tokens, hidden].
            likely: How likely the most likely number is to be in the mean, in (1 / slots, 1).
        """
        scores = self.log_probabilities(states)
        low, high = -_SHARPEST, _SHARPEST
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            found = torch.softmax(scores * 10**middle, dim=-1).amax(dim=-1).mean()
            low, high = (low, middle) if float(found) > likely else (middle, high)
        self.weight.mul_(10**low)

    def rules(self) -> tuple[KRule, ...]:
        """Make the rules that use the most likely number.

        Returns:
            One for each MoE layer; they own their rows.
        """
        weight = self.weight.detach().cpu().numpy()
        return tuple(
            KRule(slots=slots, allocator=weight[layer, :slots].copy())
            for layer, slots in enumerate(self.slots)
        )


def mean_number(log_probabilities: torch.Tensor) -> torch.Tensor:
    """Return the expected number of experts.

    Args:
        log_probabilities: [..., slots].

    Returns:
        [...], in [1, slots].
    """
    numbers = torch.arange(1, log_probabilities.shape[-1] + 1, device=log_probabilities.device)
    return (log_probabilities.exp() * numbers).sum(dim=-1)
