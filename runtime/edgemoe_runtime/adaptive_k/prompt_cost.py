"""The cost of a prompt by its length, and the part of a deadline that it gets."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PromptCost:
    """Cost of a prompt: time = b * (tokens + offset * runs), with b the time of a token.

    Attributes:
        offset: fixed time of a run of the engine, in tokens, in [0, inf).
        chunk_tokens: most tokens of one run.
    """

    offset: float = 0.0
    chunk_tokens: int = 512

    def in_tokens(self, tokens: int, runs: int = 1) -> float:
        """Return the cost of a prompt, as a number of tokens.

        Args:
            tokens: of the prompt, with those of choices behind it.
            runs: of the engine that it needs, where they are more than its tokens need.
        """
        return tokens + self.offset * max(runs, math.ceil(tokens / self.chunk_tokens))


def prompt_share_ms(
    left_ms: float, full_ms: tuple[float, float], least: tuple[float, float]
) -> float:
    """Split the time that is left between a prompt and the new tokens behind it.

    Args:
        left_ms: time for both.
        full_ms: time that each takes at the full k, above 0 in the sum.
        least: cost of each on the last rung, over the full k, in (0, 1].

    Returns:
        Time for the prompt. Where both are too slow at the full k, each saves in proportion
        to the time that it can save; neither gets less than it takes on the last rung, unless
        both together do.
    """
    prompt, decode = full_ms
    short = prompt + decode - left_ms
    saves = prompt * (1 - least[0]), decode * (1 - least[1])
    if short <= 0 or not sum(saves) > 0:
        return left_ms * prompt / (prompt + decode)
    return prompt - short * saves[0] / sum(saves)
