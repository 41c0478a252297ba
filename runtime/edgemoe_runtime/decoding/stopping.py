"""Stop strings in a stream of text: nothing at or past a stop string is ever emitted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from edgemoe_runtime.errors import RequestError
from edgemoe_runtime.messages import quote

if TYPE_CHECKING:
    from collections.abc import Sequence


def check_stop(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return stop strings as a tuple.

    Raises:
        RequestError: when one is empty or no string.
    """
    asked = cast("object", stop)
    given: Any = () if asked is None else (asked,) if isinstance(asked, str) else asked
    if not isinstance(given, (list, tuple)) or not all(
        isinstance(one, str) and one for one in cast("Sequence[object]", given)
    ):
        raise RequestError(
            f"stop must be a string or a list of non-empty strings, got {quote(stop)}."
        )
    return tuple(cast("Sequence[str]", given))


class TokenStops:
    """Stop sequences of tokens: for special tokens, which a text is written without.

    Tokens are held back while they may be the beginning of a sequence.
    """

    def __init__(self, sequences: Sequence[Sequence[int]]) -> None:
        self._sequences = tuple(map(tuple, sequences))
        self._held: list[int] = []
        self.stopped = False

    def push(self, token: int) -> list[int]:
        """Add a token and return those that are part of the text for certain."""
        if not self._sequences:
            return [token]
        self._held.append(token)
        held = tuple(self._held)
        complete = [len(one) for one in self._sequences if held[-len(one) :] == one]
        if complete:
            self.stopped = True
            self._held = []
            return list(held[: len(held) - max(complete)])
        passed: list[int] = []
        while self._held and not self._may_begin():
            passed.append(self._held.pop(0))
        return passed

    def flush(self) -> list[int]:
        """Return the tokens that were held back, at the end of the text."""
        held, self._held = self._held, []
        return held

    def _may_begin(self) -> bool:
        held = tuple(self._held)
        return any(sequence[: len(held)] == held for sequence in self._sequences)


class StopFilter:
    """Passes text on as soon as it cannot be the beginning of a stop string.

    The stop string that is complete first ends the text, however the text is cut into pieces.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """Add text and return what may be shown now."""
        if self.stopped:
            return ""
        if not self._stop:
            return piece
        for character in piece:
            self._held += character
            complete = [string for string in self._stop if self._held.endswith(string)]
            if complete:
                self.stopped = True
                shown = self._held[: -max(map(len, complete))]
                self._held = ""
                return shown
        keep = self._possible_beginning()
        shown, self._held = (
            self._held[: len(self._held) - keep],
            self._held[-keep:] * bool(keep),
        )
        return shown

    def flush(self) -> str:
        """Return the text that was held back, at the end of the stream."""
        held, self._held = self._held, ""
        return held

    def _possible_beginning(self) -> int:
        longest = min(len(self._held), max(map(len, self._stop)) - 1)
        for length in range(longest, 0, -1):
            if any(string.startswith(self._held[-length:]) for string in self._stop):
                return length
        return 0
