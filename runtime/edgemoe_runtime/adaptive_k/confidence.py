"""Confidence in an answer of a lower rung: its margin against that of held-out lines.

A rung that was scored on held-out lines has a margin: every line whose answer was ahead of the
second best by more than that got the answer of the full k. An answer with less is of low
confidence, and escalated to the full k.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgemoe_runtime.bundle.k_ladder import KRung


def is_margin_known(ladder: Sequence[KRung], metric: str) -> bool:
    """Return whether any rung has a margin of this metric, so that answers need one.

    Args:
        ladder: the rungs.
        metric: `perplexity` for texts, `accuracy` for choices.
    """
    qualities = [rung.quality for rung in ladder if rung.quality is not None]
    return any(each.metric == metric and each.margin is not None for each in qualities)


def find_low_confidence(rung: KRung, metric: str, margin: float) -> str:
    """Return why an answer may be another one at the full k, or "" where it is not likely.

    Args:
        rung: lowest rung that anything of the answer ran on.
        metric: `perplexity` for texts, `accuracy` for choices.
        margin: how far the answer is ahead of the second best, in nats: of texts on average
            over new tokens.
    """
    quality = rung.quality
    if quality is None or quality.margin is None or quality.metric != metric:
        return ""
    if margin > quality.margin:
        return ""
    return f"ahead by {margin:.3g} nats, more than {quality.margin:.3g} needed"
