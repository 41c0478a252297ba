"""Text to token ids and back; `tokenizers` is imported when a tokenizer is loaded."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from edgemoe_runtime.errors import BundleError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_REPLACEMENT = "\ufffd"
_CONTEXT_TOKENS = 8
_MAX_CHARACTER_BYTES = 4  # of a character in UTF-8


class Tokenizer:
    """The bundle's tokenizer.json."""

    def __init__(self, path: Path) -> None:
        """Load it.

        Raises:
            BundleError: when the file or the package is missing or broken.
        """
        try:
            tokenizers: Any = importlib.import_module("tokenizers")
        except ImportError as error:
            raise BundleError(
                f"A session needs the package tokenizers, got {error}. Install it with `pip"
                " install tokenizers`."
            ) from error
        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises Exception itself
            raise BundleError(
                f"{path} must be a tokenizer of the `tokenizers` library, got: {error}. Export"
                " the bundle again."
            ) from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Return token ids; special tokens are those the tokenizer adds around a text."""
        encoding = (
            encode_once(self._tokenizer, text)
            if special_tokens
            else self._tokenizer.encode(text, add_special_tokens=False)
        )
        ids: list[int] = encoding.ids
        return ids

    def special_sequence(self, text: str) -> tuple[int, ...]:
        """Return the tokens of a text that has special tokens in it, () of any other.

        Special tokens are left out of decoded text, so nothing in it can match them.

        Args:
            text: a stop string.
        """
        added: dict[int, Any] = self._tokenizer.get_added_tokens_decoder()
        special = {id_: token.content for id_, token in added.items() if token.special}
        for id_, content in special.items():
            if content == text:
                return (id_,)
        if not any(content in text for content in special.values()):
            return ()
        ids = self.encode(text, special_tokens=False)
        return tuple(ids) if special.keys() & set(ids) else ()

    def token(self, id_: int) -> str | None:
        """Return what a token is called, None where there is none of this id."""
        name: str | None = self._tokenizer.id_to_token(id_)
        return name

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids without special tokens."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text


def encode_once(tokenizer: Any, text: str) -> Any:
    """Encode a text with the special tokens that a tokenizer adds, but no first one twice.

    A prompt that a chat template wrote begins with the token that the tokenizer would put in
    front. Nothing is added to it then, as in lm-eval.

    Args:
        tokenizer: a `tokenizers.Tokenizer`.
        text: the text.

    Returns:
        A `tokenizers.Encoding`.
    """
    encoding = tokenizer.encode(text)
    if encoding.special_tokens_mask[:1] == [1]:
        plain = tokenizer.encode(text, add_special_tokens=False)
        if plain.ids[:1] == encoding.ids[:1]:
            return plain
    return encoding


class Detokenizer:
    """Decodes token by token and never shows half a character.

    A character may be spread over several tokens; until it is whole, decoding ends in a
    replacement character and the text is held back.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        """Start after a prompt.

        Args:
            tokenizer: the bundle's tokenizer.
            prompt: token ids before the first new one. The last few are decoded along,
                since some tokenizers drop the space before a text's first word.
        """
        self._tokenizer = tokenizer
        start = max(0, len(prompt) - _CONTEXT_TOKENS)
        for _ in range(_MAX_CHARACTER_BYTES - 1):
            # decoders of byte tokens give up a whole run where its first character is cut
            if start == 0 or not tokenizer.decode(prompt[start:]).startswith(_REPLACEMENT):
                break
            start -= 1
        self._ids = list(prompt[start:])
        self._start = 0
        self._shown = len(self._ids)

    def push(self, token: int) -> str:
        """Add a token and return the text that became certain."""
        self._ids.append(token)
        return self._take(final=False)

    def flush(self) -> str:
        """Return what is left at the end, with replacement characters for broken ones."""
        return self._take(final=True)

    def _take(self, *, final: bool) -> str:
        before = self._tokenizer.decode(self._ids[self._start : self._shown])
        text = self._tokenizer.decode(self._ids[self._start :])
        if len(text) <= len(before) or (text.endswith(_REPLACEMENT) and not final):
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        return text[len(before) :]
