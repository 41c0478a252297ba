"""A step down of a session: an engine, a deadline or a rung that was left, and the reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FallbackKind = Literal["engine", "confidence", "deadline", "allocator"]


@dataclass(frozen=True)
class Fallback:
    """A step down of a session, and the reason.

    Attributes:
        backend: the engine that was left; of the other kinds the rung of the k ladder.
        reason: why, in words.
        kind: `engine`: the next one of the chain serves. `confidence`: an answer of low
            confidence, which is escalated to the full k where there is time. `deadline`: no
            rung is fast enough. `allocator`: the graph does not choose k by token, a fixed
            table does.
    """

    backend: str
    reason: str
    kind: FallbackKind = "engine"

    def __str__(self) -> str:
        name = self.backend if self.kind == "engine" else f"{self.kind}, {self.backend}"
        return f"{name}: {self.reason}"

    def to_dict(self) -> dict[str, str]:
        """Convert to JSON.

        Returns:
            The keys `backend`, `reason` and `kind`.
        """
        return {"backend": self.backend, "reason": self.reason, "kind": self.kind}
