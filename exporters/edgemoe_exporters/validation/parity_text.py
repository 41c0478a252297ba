"""Tokens to compare a graph on: from the task's examples, or from a built-in text."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from edgemoe.tasks import TaskFile

_LINES = 16
_MIN_DISTINCT_TOKENS = 8
_TEXT = (
    "The spindle of station 4 vibrates above its limit. Check the bearing, then the alignment, "
    "and write down what you found: def median(values): return sorted(values)[len(values) // 2]"
)


def sample_tokens(task: TaskFile | None, tokenizer: Tokenizer, vocabulary: int) -> list[int]:
    """Return tokens to compare a graph on.

    Args:
        task: Its first examples are used; None for a text of prose and code.
        tokenizer: The model's tokenizer.
        vocabulary: Size of the model's vocabulary.

    Returns:
        Token ids, in [0, vocabulary).
    """
    text = _TEXT
    if task is not None:
        text = "\n".join(record.calibration_text for record in task.records[:_LINES])
    ids = [token for token in tokenizer.encode(text).ids if token < vocabulary]
    if len(set(ids)) < _MIN_DISTINCT_TOKENS:
        # A tokenizer that knows none of these words would show one token only.
        ids = [(7 * position + 3) % vocabulary for position in range(vocabulary)]
    return ids
