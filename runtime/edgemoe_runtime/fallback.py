"""A step down: what a session could not use or keep, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FallbackKind = Literal["engine", "confidence", "deadline", "allocator"]


@dataclass(frozen=True)
class Fallback:
    """What could not be used or kept, and why.

    Attributes:
        backend: what was left: an engine; of the other kinds the rung of the k ladder.
        reason: why.
        kind: `engine`: the next one of the chain serves. `confidence`: an answer was too near
            to another, so it was asked for again at the full k. `deadline`: no rung is fast
            enough. `allocator`: the graph does not choose k by token, a fixed table does.
    """

    backend: str
    reason: str
    kind: FallbackKind = "engine"

    def __str__(self) -> str:
        name = self.backend if self.kind == "engine" else f"{self.kind}, {self.backend}"
        return f"{name}: {self.reason}"

    def to_dict(self) -> dict[str, str]:
        """Return the JSON object."""
        return {"backend": self.backend, "reason": self.reason, "kind": self.kind}
