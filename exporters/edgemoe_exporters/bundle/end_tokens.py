"""The tokens that end a text, from all three places where checkpoints keep them.

A fine-tune often has the base model's end token in config.json, those of its chats in
generation_config.json, and one of the two in the tokenizer's settings. Whichever of them the
model writes, the text is over.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgemoe_runtime.chat import read_named_tokens
from edgemoe_runtime.errors import BundleError
from edgemoe_runtime.input_files import parse_strict

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tokenizers import Tokenizer

    from edgemoe.models.checkpoint import Checkpoint

NO_END = (
    "the checkpoint names no end token, neither in config.json nor generation_config.json nor "
    "the tokenizer's settings: only max_new_tokens and stop strings end an answer. Put "
    "eos_token_id into generation_config.json and export again."
)
_FILES = ("generation_config.json", "config.json")


def find_end_tokens(checkpoint: Checkpoint, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Collect the end tokens of a checkpoint.

    Args:
        checkpoint: The checkpoint.
        tokenizer: Its tokenizer.

    Returns:
        Token ids that the model has embeddings for, each once; may be empty.
    """
    vocabulary = int(checkpoint.config.vocab_size)
    found: list[int] = []
    for name in _FILES:
        for value in _values(_read(checkpoint, name)):
            found += [
                one
                for one in (value if isinstance(value, list) else [value])
                if isinstance(one, int) and not isinstance(one, bool)
            ]
    eos = checkpoint.config.eos_token_id
    found += [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    try:
        named = read_named_tokens(checkpoint.path, checkpoint.read).get("eos_token")
    except BundleError:
        named = None  # who reads the tokenizer's settings says what is wrong with them
    of_tokenizer = None if named is None else tokenizer.token_to_id(named)
    found += [] if of_tokenizer is None else [of_tokenizer]
    return tuple(dict.fromkeys(one for one in found if 0 <= one < vocabulary))


def _read(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    content = checkpoint.read(name)
    try:
        found = {} if content is None else parse_strict(content, infinities=True)
    except ValueError:
        found = {}
    return found if isinstance(found, dict) else {}


def _values(config: dict[str, Any]) -> Iterator[Any]:
    """Yield `eos_token_id` of a configuration and of its part for text."""
    yield config.get("eos_token_id")
    inner = config.get("text_config")
    if isinstance(inner, dict):
        yield inner.get("eos_token_id")
