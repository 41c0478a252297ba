"""The likelihood of whole texts, and what it is per byte and per word.

The windows are those of `loglikelihood_rolling` in lm-eval
(https://github.com/EleutherAI/lm-evaluation-harness, `get_rolling_token_windows`), with one
token of context: every token of a text is scored once, the first of all after a prefix token.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgemoe.errors import CheckpointError
from edgemoe.evaluate.intervals import bootstrap_perplexity
from edgemoe.evaluate.scorer import Request
from edgemoe.models.gguf.reading import open_gguf
from edgemoe_runtime.bundle.names import MANIFEST_FILE
from edgemoe_runtime.input_files import parse_strict, read_file

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tokenizers import Encoding, Tokenizer

_FILES = ("tokenizer_config.json", "special_tokens_map.json")
# lm-eval's own choice: the first of these that the tokenizer has.
_PREFIXES = ("bos_token", "eos_token")


@dataclass(frozen=True, kw_only=True)
class RollingText:
    """One text, to be scored whole.

    Attributes:
        requests: One per window.
        utf8_bytes: Length of the text in UTF-8.
        words: Pieces of the text between runs of white space, as lm-eval counts them.
    """

    requests: tuple[Request, ...]
    utf8_bytes: int
    words: int


def roll_text(
    text: str, encoding: Encoding, *, prefix_token: int, window: int, most_tokens: int | None
) -> RollingText | None:
    """Lay windows over a text.

    Tokens that the tokenizer adds to a text are no part of it, and are not scored.

    Args:
        text: The text.
        encoding: Its tokens.
        prefix_token: What the first token is judged after.
        window: Most tokens that the model reads at once, in [1, inf).
        most_tokens: Cut the text behind so many of its tokens; None takes all.

    Returns:
        The windows; None where there is no token.
    """
    special = encoding.special_tokens_mask[:most_tokens]
    own = [position for position, added in enumerate(special) if not added]
    if not own:
        return None
    if len(special) < len(encoding.ids):
        text = text[: encoding.offsets[own[-1]][1]]
    ids = [encoding.ids[position] for position in own]
    requests = [Request((prefix_token,), (tuple(ids[:window]),))]
    for start in range(window, len(ids), window):
        end = min(start + window, len(ids))
        # The last window is moved back so that it is full, which gives it more context.
        context, scored = ids[end - window - 1 : start], ids[start:end]
        requests.append(Request(tuple(context), (tuple(scored),)))
    return RollingText(
        requests=tuple(requests),
        utf8_bytes=len(text.encode()),
        words=len(re.split(r"\s+", text)),
    )


def summarise_rolling(
    texts: Sequence[RollingText], log_likelihoods: Sequence[float]
) -> dict[str, Any]:
    """Spread the likelihood of texts over their bytes and words.

    With L the sum of log-likelihoods: word perplexity is exp(-L / words), byte perplexity
    exp(-L / bytes), and bits per byte -L / bytes / ln 2.

    Args:
        texts: The texts, at least one.
        log_likelihoods: Of each text, in nats.

    Returns:
        The sums and the three quantities under lm-eval's names.
    """
    total = float(sum(log_likelihoods))
    sizes = np.array([text.utf8_bytes for text in texts], dtype=np.float64)
    words, length = sum(text.words for text in texts), int(sizes.sum())
    return {
        "log_likelihood": total,
        "bytes": length,
        "words": words,
        "word_perplexity": exp_or_none(-total / words),
        "byte_perplexity": exp_or_none(-total / length),
        "byte_perplexity_ci95": list(bootstrap_perplexity(-np.array(log_likelihoods), sizes)),
        "bits_per_byte": -total / length / math.log(2),
    }


def exp_or_none(nats: float) -> float | None:
    """Return exp(nats), or None where no float is large enough: JSON has no infinity."""
    try:
        return math.exp(nats)
    except OverflowError:
        return None


def find_prefix_token(path: Path, tokenizer: Tokenizer) -> int | None:
    """Find the token that a text's first token is judged after.

    Args:
        path: Checkpoint or bundle.
        tokenizer: Its tokenizer.

    Returns:
        The id of the tokenizer's token for the beginning of a text, else of that for its end;
        None where the directory names neither.

    Raises:
        CheckpointError: A file that would name them is no JSON object.
    """
    gguf = None if (path / MANIFEST_FILE).exists() else open_gguf(path)
    if gguf is not None:
        settings = [json.loads(gguf.settings[_FILES[0]])]
    else:
        settings = [_read_settings(path / name) for name in _FILES if (path / name).is_file()]
    for key in _PREFIXES:
        for found in settings:
            value = found.get(key)
            content = value.get("content") if isinstance(value, dict) else value
            if isinstance(content, str):
                return tokenizer.token_to_id(content)
    return None


def _read_settings(file: Path) -> dict[str, Any]:
    try:
        found = parse_strict(read_file(file), infinities=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} must be JSON, got: {error}. Copy it again.") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} must be a JSON object, got a list or a value.")
    return found
