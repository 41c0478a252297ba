"""Keeps the requests of a session on the rung that the controller wants.

The controller (`edgemoe_runtime.controller`) decides from numbers alone. Here they come from:
times of prompts and of new tokens, what is left of the deadline, and a reading of the sensors,
once a second at most. Prompts and new tokens have a controller each, for a rung that saves time
on the one may save little on the other; both feel the machine's state.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import statistics
import time
from collections import deque
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from edgemoe_runtime.chain import Fallback
from edgemoe_runtime.controller import ControlState, Limits, Signals, decide
from edgemoe_runtime.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from edgemoe_runtime.controller import Move
    from edgemoe_runtime.json_fields import Json
    from edgemoe_runtime.manifest_ladder import KRung
    from edgemoe_runtime.sensors import Sensors

Phase = Literal["prompt", "decode"]
_LOG = logging.getLogger(__name__)
_READ_SECONDS = 1.0
_MOVES_KEPT = 64


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
class Pacing:
    """What a session is to keep to.

    A time that is not above 0 is refused with RequestError.

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
        for name, value in (("deadline_ms", self.deadline_ms), ("token_ms", self.token_ms)):
            if value is not None and not value > 0:
                raise RequestError(f"{name} must be above 0, got {value}.")


class Pace:
    """The rung in force, and what moved it.

    Attributes:
        moves: the latest changes of the rung, oldest first.
        move_count: all of them.
        request_moves: those of the request under way, or of the last one.
    """

    def __init__(
        self,
        ladder: Sequence[KRung],
        use: Callable[[tuple[int, ...]], None],
        pacing: Pacing,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin on the first rung.

        Args:
            ladder: the rungs; with more than one, each has a cost.
            use: puts a cap in force.
            pacing: what to keep to.
            clock: seconds that never go back.
        """
        self.ladder = tuple(ladder)
        self.moves: deque[KMove] = deque(maxlen=_MOVES_KEPT)
        self.move_count = 0
        self.request_moves: list[KMove] = []
        self._use = use
        self._pacing = pacing
        self._clock = clock
        decode = [1.0 if rung.cost is None else rung.cost.decode for rung in ladder]
        prefill = [1.0 if rung.cost is None else rung.cost.prefill for rung in ladder]
        self._costs = {"prompt": falling(prefill), "decode": falling(decode)}
        self._states = {"prompt": ControlState(), "decode": ControlState()}
        self._times: dict[str, list[float]] = {"prompt": [], "decode": []}
        self._read_at: float | None = None
        self._in_force = ladder[0]
        self._spent_ms = 0.0
        self._impossible = ""
        self._held = False

    @property
    def rung(self) -> KRung:
        """The rung in force."""
        return self._in_force

    @property
    def fallbacks(self) -> tuple[Fallback, ...]:
        """Whether the request's deadline could be kept on no rung."""
        if not self._impossible:
            return ()
        return (Fallback(self._in_force.name, self._impossible, kind="deadline"),)

    def begin(self) -> None:
        """Begin a request."""
        self._spent_ms = 0.0
        self._impossible = ""
        self.request_moves = []

    def before_prompt(self, tokens: int, then: int) -> None:
        """Choose the rung for a prompt.

        Args:
            tokens: tokens that are about to run.
            then: new tokens that may follow.
        """
        allowed = self._left_ms()
        prompt, decode = self._unit_ms("prompt"), self._unit_ms("decode")
        if allowed is not None and then and prompt and decode:
            # As much of what is left as is the prompt's part of the work.
            allowed *= tokens * prompt / (tokens * prompt + then * decode)
        elif then and not (prompt and decode):
            allowed = None
        self._choose("prompt", None if allowed is None else allowed / tokens)

    def after_prompt(self, tokens: int, seconds: float) -> None:
        """Take in how long a prompt took."""
        self._take("prompt", 1000 * seconds / tokens, 1000 * seconds)

    def before_step(self, remaining: int) -> None:
        """Choose the rung for a new token.

        Args:
            remaining: new tokens that may still come, this one included.
        """
        left = self._left_ms()
        allowed = None if left is None else left / remaining
        self._choose("decode", allowed, self._pacing.token_ms)

    def after_step(self, seconds: float) -> None:
        """Take in how long a new token took."""
        self._take("decode", 1000 * seconds, 1000 * seconds)

    def full_fits(self, tokens: int, new: int = 0) -> bool:
        """Ask whether a request can run once more, at the full k, in what is left.

        Args:
            tokens: tokens of the prompt.
            new: new tokens; the first one comes out of the prompt.
        """
        if new > 1 and self._pacing.token_ms is not None and self._states["decode"].rung:
            # The controller has left the full k for new tokens that would not be in time.
            return False
        left = self._left_ms()
        if left is None:
            return True
        prompt, decode = self._unit_ms("prompt") or 0.0, self._unit_ms("decode") or 0.0
        return tokens * prompt + max(new - 1, 0) * decode <= left

    def use_full(self) -> None:
        """Put the first rung in force, until the next choice."""
        self._put(0)

    @contextlib.contextmanager
    def held_at_full(self) -> Generator[None]:
        """Stay on the first rung, and forget no move, while a request runs once more."""
        moves, self._held = self.request_moves, True
        try:
            yield
        finally:
            self._held = False
            self.request_moves = moves

    def _left_ms(self) -> float | None:
        if self._pacing.deadline_ms is None:
            return None
        return self._pacing.deadline_ms - self._spent_ms

    def _unit_ms(self, phase: Phase) -> float | None:
        """Return the time of a token at the full k, as far as it was measured."""
        state, cost = self._states[phase], self._costs[phase]
        new = [took / cost[state.rung] for took in self._times[phase]]
        units = (*state.unit_ms, *new)[-3:]
        return statistics.median(units) if units else None

    def _take(self, phase: Phase, unit_ms: float, spent_ms: float) -> None:
        if not self._held:
            self._times[phase].append(unit_ms)
        self._spent_ms += spent_ms

    def _choose(
        self, phase: Phase, allowed_ms: float | None, each_ms: float | None = None
    ) -> None:
        if self._held:
            self._put(0)
            return
        now, costs = self._clock(), self._costs[phase]
        signals = Signals(
            seconds=now,
            token_ms=tuple(self._times[phase]),
            allowed_ms=allowed_ms,
            each_ms=each_ms,
            sensors=self._fresh_reading(now),
        )
        self._times[phase] = []
        state, move = decide(self._states[phase], signals, costs, self._pacing.limits)
        # What the machine's state takes away, it takes from both.
        self._states = {
            name: replace(
                other,
                pressed=state.pressed,
                pressed_at=state.pressed_at,
                over_current=state.over_current,
            )
            for name, other in self._states.items()
        }
        self._states[phase] = state
        if move is not None:
            self._note(phase, move)
        if state.impossible and not self._impossible:
            fastest = (self._unit_ms(phase) or 0.0) * costs[-1]
            given = [each for each in (allowed_ms, each_ms) if each is not None]
            self._impossible = (
                f"no rung is fast enough for the deadline: on the fastest a token of the "
                f"{'prompt' if phase == 'prompt' else 'answer'} takes {fastest:.2f} ms, "
                f"{max(min(given), 0.0):.2f} are left for it"
            )
            _LOG.warning("%s", self._impossible)
        self._put(state.rung)

    def _fresh_reading(self, now: float) -> Sensors | None:
        if self._pacing.read is None:
            return None
        if self._read_at is not None and now - self._read_at < _READ_SECONDS:
            return None
        self._read_at = now
        return self._pacing.read()

    def _put(self, rung: int) -> None:
        wanted = self.ladder[rung]
        if wanted is not self._in_force:
            self._in_force = wanted
            self._use(wanted.k_cap)

    def _note(self, phase: Phase, move: Move) -> None:
        noted = KMove(
            phase=phase,
            before=self.ladder[move.before].name,
            after=self.ladder[move.after].name,
            reason=move.reason,
        )
        _LOG.info("k %s", noted)
        self.moves.append(noted)
        self.request_moves.append(noted)
        self.move_count += 1


def falling(costs: Sequence[float]) -> list[float]:
    """Return costs that fall from rung to rung, where they were measured not to."""
    # A rung that is on the ladder for its decode may save nothing on prompts.
    least = 1e-6
    return [
        most * (1 - least * rung)
        for rung, most in enumerate(itertools.accumulate((1.0, *costs[1:]), min))
    ]
