"""What a session is to keep to, and how it tells what that led to."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from edgemoe_runtime.adaptive_k.limits import Limits
from edgemoe_runtime.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgemoe_runtime.device.sensors import Sensors
    from edgemoe_runtime.json_fields import Json

Phase = Literal["prompt", "decode"]


@dataclass(frozen=True, kw_only=True)
class KMove:
    """A change of the cap of experts per token.

    Attributes:
        phase: whether it is for prompts or for new tokens.
        before: name of the rung that was left.
        after: name of the rung that was entered.
        reason: why.
    """

    phase: Phase
    before: str
    after: str
    reason: str

    def __str__(self) -> str:
        return f"{self.phase}: {self.before} to {self.after}: {self.reason}"

    def to_dict(self) -> dict[str, Json]:
        """Return the JSON object."""
        return {
            "phase": self.phase,
            "from": self.before,
            "to": self.after,
            "reason": self.reason,
        }


@dataclass(frozen=True, kw_only=True)
class PromptWork:
    """How the time of a prompt grows with its length: b (tokens + runs offset).

    Attributes:
        offset: tokens whose time a run of the engine takes beside its own, in [0, inf).
        chunk_tokens: most tokens of one run.
    """

    offset: float = 0.0
    chunk_tokens: int = 512

    def of(self, tokens: int, runs: int = 1) -> float:
        """Return how many tokens' time a prompt takes.

        Args:
            tokens: of the prompt, with those of choices behind it.
            runs: of the engine that it needs, where they are more than its tokens need.
        """
        return tokens + self.offset * max(runs, math.ceil(tokens / self.chunk_tokens))


@dataclass(frozen=True, kw_only=True)
class Pacing:
    """What a session is to keep to.

    A time that is not above 0, or not finite, is refused with RequestError.

    Attributes:
        deadline_ms: wall-clock time of a request, or None.
        token_ms: wall-clock time of a new token, or None.
        limits: when the controller moves.
        read: reads the sensors; None for a session that does not look at the machine.
    """

    deadline_ms: float | None = None
    token_ms: float | None = None
    limits: Limits = field(default_factory=Limits)
    read: Callable[[], Sensors] | None = None

    def __post_init__(self) -> None:
        for name in ("deadline_ms", "token_ms"):
            value: object = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, int | float) or not 0 < value < math.inf:
                raise RequestError(f"{name} must be above 0 and finite, got {value!r}.")
