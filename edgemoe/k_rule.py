"""How many experts each token uses in one layer.

Plans are read where torch is not installed, so it is imported by what computes only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

_EPSILON = float(np.finfo(np.float32).eps)


@dataclass(frozen=True, kw_only=True, eq=False)
class KRule:
    """A rule that looks at one token and at nothing that the token comes with.

    Without `top_p` and `allocator` every token uses `slots` experts. With both, the
    smaller number counts.

    Attributes:
        slots: Most experts that a token may use, in [1, inf); it may be above the router's own
            top_k.
        top_p: Share of the router probability that a token's experts must reach, in (0, 1]; see
            `edgemoe.models.routing.routers.select`.
        allocator: A linear head over the router's input, float32 [slots, hidden + 1], the last
            column its bias: the largest score says how many experts the token uses, that of
            the first row one (Ada-K, https://arxiv.org/abs/2410.10456, equation 3).
        needs: Perplexity with 1, 2, ... experts in this layer, where `alloc-l` has measured
            it: from it an export makes the tables of its k ladder. Tokens do not depend on it.
    """

    slots: int
    top_p: float | None = None
    allocator: NDArray[np.float32] | None = None
    needs: tuple[float, ...] | None = None

    @property
    def is_fixed(self) -> bool:
        """Whether all tokens use as many."""
        return self.top_p is None and self.allocator is None

    def limit(self, hidden: torch.Tensor) -> torch.Tensor | int:
        """Return the most experts that each token may use, before `top_p` is applied.

        Args:
            hidden: What the router's rows see [tokens, hidden].

        Returns:
            `slots`; int64 [tokens, 1], each in [1, slots], where there is an allocator.
        """
        if self.allocator is None:
            return self.slots
        return score_numbers(hidden, self.allocator).argmax(dim=-1, keepdim=True) + 1

    def is_near_tie(self, hidden: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
        """Find the tokens of which another engine may rightly use another number of experts.

        Args:
            hidden: What the router's rows see [tokens, hidden].
            mass: Router probability of the chosen experts, best first, float32 [tokens, slots].

        Returns:
            bool [tokens].
        """
        near = mass[:, 0] != mass[:, 0]
        if self.top_p is not None:
            near |= ((mass.cumsum(dim=-1) - self.top_p).abs() <= 64 * _EPSILON).any(dim=-1)
        if self.allocator is not None and self.slots > 1:
            best = score_numbers(hidden, self.allocator).topk(2, dim=-1).values
            longest = float(np.linalg.norm(self.allocator, axis=1).max())
            size = (1 + hidden.float().norm(dim=-1)) * longest
            near |= best[:, 0] - best[:, 1] <= 32 * _EPSILON * size
        return near


def score_numbers(
    hidden: torch.Tensor, allocator: NDArray[np.float32] | torch.Tensor
) -> torch.Tensor:
    """Score the numbers of experts.

    Args:
        hidden: What the router's rows see [tokens, hidden].
        allocator: As in `KRule`.

    Returns:
        float32 [tokens, slots].
    """
    import torch

    rows = torch.as_tensor(allocator, device=hidden.device)
    return torch.nn.functional.linear(hidden.float(), rows[:, :-1], rows[:, -1])
