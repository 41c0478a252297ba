"""Where `edgemoe run` takes its prompt from: the command line, a file, standard input."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from edgemoe.errors import ArgumentError, EdgemoeError
from edgemoe_runtime.input_files import read_file
from edgemoe_runtime.messages import quote

if TYPE_CHECKING:
    from pathlib import Path

STDIN = "-"
_MOST_BYTES = 64 << 20


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """Return the prompt.

    Args:
        prompt: Text, or `-` for standard input.
        file: A text file; its last line end is no part of the prompt.

    Returns:
        The text.

    Raises:
        ArgumentError: Both or none are given.
        EdgemoeError: It cannot be read, or is not UTF-8.
    """
    if (prompt is None) == (file is None):
        raise ArgumentError(
            "give exactly one of --prompt TEXT, --prompt - (standard input) and --prompt-file "
            "FILE."
        )
    if file is not None:
        try:
            return _decode(read_file(file, _MOST_BYTES), str(file))
        except OSError as error:
            raise EdgemoeError(
                f"the prompt's file must be readable, got {quote(str(file))}: "
                f"{error.strerror}. Check the path."
            ) from error
    assert prompt is not None
    if prompt != STDIN:
        return prompt
    return _decode(sys.stdin.buffer.read(_MOST_BYTES), "standard input")


def _decode(content: bytes, source: str) -> str:
    try:
        text = content.removeprefix(b"\xef\xbb\xbf").decode("utf-8")
    except UnicodeDecodeError as error:
        raise EdgemoeError(
            f"a prompt must be UTF-8, got the byte 0x{content[error.start]:02x} in "
            f"{quote(source)}. Convert it to UTF-8."
        ) from error
    # Editors and echo end a file with a line end that nobody typed.
    return text.removesuffix("\n").removesuffix("\r")
