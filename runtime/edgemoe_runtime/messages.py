"""How messages repeat what somebody else wrote: short, and without control characters.

A file or a prompt may hold anything. Whoever reads an error on a terminal or in a log must
still see the rule and the remedy, and no escape sequence may reach the terminal.
"""

from __future__ import annotations

import re
import unicodedata

MOST_INPUT = 200
"""Most characters of one input that a message repeats."""

_MOST_MESSAGE = 900  # characters: under a kilobyte with what surrounds it
_TAIL = 300  # of a message that is too long: the remedy stands at its end
# Controls, and marks that change the direction of text; a new line and a tab are harmless.
_HIDDEN = frozenset({"Cc", "Cs"})
_BIDIRECTIONAL = frozenset(
    "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
)
_KEPT = frozenset("\n\t")
# A quoted text, or a run without white space: both come from outside when they are this long.
_LONG = re.compile(
    rf"'[^'\n]{{{MOST_INPUT},}}'|\"[^\"\n]{{{MOST_INPUT},}}\"|\S{{{MOST_INPUT},}}"
)


def clip(text: str, most: int = MOST_INPUT) -> str:
    """Shorten a text in its middle.

    Args:
        text: any text.
        most: most characters to return, at least 3.

    Returns:
        The text, or its beginning and its end with "..." between them.
    """
    if len(text) <= most:
        return text
    tail = (most - 3) // 4
    return f"{text[: most - 3 - tail]}...{text[len(text) - tail :]}"


def escape_controls(text: str) -> str:
    """Write control characters as escapes, so that no terminal obeys them.

    Args:
        text: any text.

    Returns:
        The text; new lines and tabs stay.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(map(_escape, text))


def quote(value: object, most: int = MOST_INPUT) -> str:
    """Repeat a value in a message.

    Args:
        value: what was got.
        most: most characters.

    Returns:
        Its `repr`, shortened and without control characters.
    """
    # the repr of a long text is as long: no need to make it whole
    if isinstance(value, str) and len(value) > 2 * most:
        value = value[:most] + value[-most:]
    return clip(escape_controls(repr(value)), most)


def printable(message: str) -> str:
    """Make a message fit to be printed or logged, whatever was put into it.

    Args:
        message: a message.

    Returns:
        Without control characters; quoted texts and words of more than 200 characters are
        shortened, and so is the whole.
    """
    # what is far too long is cut before it is looked at
    text = clip(message, 20 * _MOST_MESSAGE)
    text = _LONG.sub(lambda found: clip(found[0]), escape_controls(text))
    if len(text) <= _MOST_MESSAGE:
        return text
    return f"{text[: _MOST_MESSAGE - _TAIL - 3]}...{text[-_TAIL:]}"


def _escape(character: str) -> str:
    if character in _KEPT:
        return character
    if unicodedata.category(character) in _HIDDEN or character in _BIDIRECTIONAL:
        code = ord(character)
        return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
    return character
