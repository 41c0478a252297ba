"""How likely completions are after one prompt, which runs once for all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgemoe_runtime.answers import Score
from edgemoe_runtime.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgemoe_runtime.decoder import Decoder
    from edgemoe_runtime.tokenizer import Tokenizer


def score_completions(
    decoder: Decoder, tokenizer: Tokenizer, prompt: Sequence[int], completions: Sequence[str]
) -> list[Score]:
    """Return the log-likelihood of each completion after the prompt.

    Prompt and completion are tokenised apart, so every completion starts from the very same
    cache and the result is exact.

    Args:
        decoder: runs the tokens; what its cache held is lost.
        tokenizer: of the bundle.
        prompt: token ids, at least one.
        completions: texts, at least one, each at least one token.

    Raises:
        RequestError: when a text is empty, or prompt and completion are too long.
    """
    encoded = [tokenizer.encode(text, special_tokens=False) for text in completions]
    for text, tokens in zip(completions, encoded, strict=True):
        if not tokens:
            raise RequestError(f"A completion must be at least one token, got {text!r}.")
    # a completion's last token is scored but never run
    decoder.check(prompt, max(map(len, encoded)) - 1)
    first = np.array(decoder.prefill(prompt), dtype=np.float32)
    mark = decoder.mark()
    return [
        Score(
            log_likelihood=float(decoder.continuation(mark, first, tokens).sum()),
            tokens=len(tokens),
            characters=len(text),
        )
        for text, tokens in zip(completions, encoded, strict=True)
    ]
