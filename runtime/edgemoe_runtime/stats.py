"""What a session has answered so far, in numbers."""

from __future__ import annotations

from dataclasses import dataclass

from edgemoe_runtime.decoding.answers import meets_deadline


@dataclass
class Tally:
    """What was answered so far.

    Attributes:
        requests: how many.
        seconds: of all of them together.
        new_tokens: that they made.
        last_seconds: of the last one, or None.
        deadlines_met: how many ended in time.
        late_tokens: new tokens that took longer than they may.
        asked_again: how many were answered at the full k in the end, for want of confidence.
    """

    requests: int = 0
    seconds: float = 0.0
    new_tokens: int = 0
    last_seconds: float | None = None
    deadlines_met: int = 0
    late_tokens: int = 0
    asked_again: int = 0

    def add(self, seconds: float, new_tokens: int, deadline_ms: float | None) -> None:
        """Count a request that was answered."""
        self.requests += 1
        self.seconds += seconds
        self.new_tokens += new_tokens
        self.last_seconds = seconds
        self.deadlines_met += meets_deadline(seconds, deadline_ms) is True
