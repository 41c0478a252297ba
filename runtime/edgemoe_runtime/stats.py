"""Counts of the requests that a session has answered."""

from __future__ import annotations

from dataclasses import dataclass

from edgemoe_runtime.decoding.answers import meets_deadline


@dataclass
class SessionStats:
    """Counts of the requests that a session has answered.

    Attributes:
        requests: number of requests.
        seconds: time of all of them together.
        new_tokens: tokens that they generated.
        last_seconds: time of the last one, or None.
        deadlines_met: requests that ended in time.
        late_tokens: new tokens that took longer than `token_ms`.
        escalated: requests that were escalated to the full k, for want of confidence.
    """

    requests: int = 0
    seconds: float = 0.0
    new_tokens: int = 0
    last_seconds: float | None = None
    deadlines_met: int = 0
    late_tokens: int = 0
    escalated: int = 0

    def add(self, seconds: float, new_tokens: int, deadline_ms: float | None) -> None:
        """Count a request.

        Args:
            seconds: its wall-clock time.
            new_tokens: tokens that it generated.
            deadline_ms: its deadline, or None.
        """
        self.requests += 1
        self.seconds += seconds
        self.new_tokens += new_tokens
        self.last_seconds = seconds
        self.deadlines_met += meets_deadline(seconds, deadline_ms) is True
