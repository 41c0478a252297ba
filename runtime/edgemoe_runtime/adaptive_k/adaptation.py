"""Settings of a session that adapts k, and the record of a move along the k ladder."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from edgemoe_runtime.adaptive_k.limits import Limits
from edgemoe_runtime.arguments import check_number
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
        reason: why, in words.
    """

    phase: Phase
    before: str
    after: str
    reason: str

    def __str__(self) -> str:
        return f"{self.phase}: {self.before} to {self.after}: {self.reason}"

    def to_dict(self) -> dict[str, Json]:
        """Convert to JSON.

        Returns:
            The keys `phase`, `from`, `to` and `reason`.
        """
        return {
            "phase": self.phase,
            "from": self.before,
            "to": self.after,
            "reason": self.reason,
        }


@dataclass(frozen=True, kw_only=True)
class AdaptationConfig:
    """Deadlines and limits that a session is to keep.

    Attributes:
        deadline_ms: wall-clock time of a request, above 0, or None.
        token_ms: wall-clock time of a new token, above 0, or None.
        limits: thresholds and waiting times of the controller.
        read: reads the sensors; None for a session that does not look at the machine.

    Raises:
        RequestError: when a time is not above 0, or not finite.
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
            if check_number(name, value, "above 0 and finite") <= 0:
                raise RequestError(f"{name} must be above 0 and finite, got {value!r}.")
