"""Stop strings in a stream of text: nothing at or past a stop string is ever emitted."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgemoe_runtime.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Sequence


def check_stop(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return stop strings as a tuple.

    Raises:
        RequestError: when one is empty.
    """
    strings = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
    if "" in strings:
        raise RequestError(f"stop must hold non-empty strings, got {strings!r}.")
    return strings


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
