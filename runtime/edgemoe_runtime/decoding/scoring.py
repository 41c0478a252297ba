"""Log-likelihoods of completions after one prompt, which runs once for all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgemoe_runtime.decoding.answers import Score
from edgemoe_runtime.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgemoe_runtime.decoding.decoder import Decoder
    from edgemoe_runtime.decoding.tokenizer import Tokenizer


@dataclass(frozen=True)
class Comparison:
    """Completions of one prompt, as tokens.

    Attributes:
        context: tokens that all begin with, at least one.
        continuations: tokens that each goes on with, at least one.
        characters: characters of each completion.
    """

    context: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]
    characters: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Tokens that run: the last one of a continuation is scored but never run."""
        return len(self.context) + sum(len(tokens) - 1 for tokens in self.continuations)

    @property
    def runs(self) -> int:
        """Runs of the engine: a continuation of one token needs none."""
        return 1 + sum(len(tokens) > 1 for tokens in self.continuations)


def compare_completions(
    decoder: Decoder, tokenizer: Tokenizer, prompt: str, completions: Sequence[str]
) -> Comparison:
    """Tokenise completions of a prompt.

    Each completion is tokenised together with the prompt, as `edgemoe evaluate` and lm-eval
    do it; the tokens that all begin with run once. White space at the prompt's end counts to
    the completions, and so does a token that crosses the border.

    Args:
        decoder: checks that the tokens fit.
        tokenizer: of the bundle.
        prompt: text before the completions.
        completions: texts, at least one, none empty.

    Raises:
        RequestError: when a text is empty, prompt and completion are too long, or nothing
            comes before the completions.
    """
    for text in completions:
        if not text:
            raise RequestError(f"A completion must be at least one token, got {text!r}.")
    wholes = [tokenizer.encode(prompt + text) for text in completions]
    before = tokenizer.encode(prompt.rstrip()) or tokenizer.encode(prompt)
    shared = _count_shared([before, *wholes])
    if shared == 0 and len({tuple(whole[:1]) for whole in wholes}) > 1:
        # One completion's first token would be the context of the others.
        raise RequestError(
            "A prompt and its completions must begin with the same token, got the prompt"
            f" {prompt!r}. Lengthen the prompt."
        )
    # Every completion keeps a token of its own, and the first token of all is context.
    shared = max(1, min(shared, *(len(whole) - 1 for whole in wholes)))
    if min(map(len, wholes)) < 2:
        raise RequestError(
            "A prompt and its completion must be two or more tokens together, got one. "
            "Lengthen the prompt."
        )
    for whole in wholes:
        # a completion's last token is scored but never run
        decoder.check(whole, -1)
    return Comparison(
        context=tuple(wholes[0][:shared]),
        continuations=tuple(tuple(whole[shared:]) for whole in wholes),
        characters=tuple(map(len, completions)),
    )


def score_completions(decoder: Decoder, comparison: Comparison) -> list[Score]:
    """Return the log-likelihood of each completion after the prompt, which runs once.

    Args:
        decoder: runs the tokens; what its cache held is lost.
        comparison: the tokens.
    """
    first = np.array(decoder.prefill(comparison.context), dtype=np.float32)
    mark = decoder.mark()
    return [
        Score(
            log_likelihood=float(decoder.continuation(mark, first, tokens).sum()),
            tokens=len(tokens),
            characters=characters,
        )
        for tokens, characters in zip(
            comparison.continuations, comparison.characters, strict=True
        )
    ]


def margin_over_second(scores: Sequence[Score], best: int) -> float:
    """Return by how much a choice is more likely than all others.

    Args:
        scores: one for each choice.
        best: index of the choice.

    Returns:
        Nats; below 0 where another one is more likely, infinity for a single choice.
    """
    totals = [score.log_likelihood for score in scores]
    others = totals[:best] + totals[best + 1 :]
    return totals[best] - max(others) if others else float("inf")


def _count_shared(sequences: Sequence[Sequence[int]]) -> int:
    count = 0
    for tokens in zip(*sequences, strict=False):
        if len(set(tokens)) > 1:
            break
        count += 1
    return count
