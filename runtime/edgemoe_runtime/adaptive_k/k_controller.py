"""Keeps the requests of a session on the rung that the controller wants.

The controller (`edgemoe_runtime.adaptive_k.controller`) decides from numbers alone. Here they
come from: times of prompts and of new tokens, what is left of the deadline, and a reading of
the sensors, once a second at most. Prompts and new tokens have a controller each, for a rung
that saves time on the one may save little on the other; both feel the machine's state.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import statistics
import time
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING

from edgemoe_runtime.adaptive_k.adaptation import KMove, PromptWork
from edgemoe_runtime.adaptive_k.decision import ControlState, Signals, decide
from edgemoe_runtime.fallback import Fallback

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from edgemoe_runtime.adaptive_k.adaptation import Pacing, Phase
    from edgemoe_runtime.adaptive_k.decision import Move
    from edgemoe_runtime.bundle.k_ladder import KRung
    from edgemoe_runtime.device.sensors import Sensors

_LOG = logging.getLogger(__name__)
_READ_SECONDS = 1.0
_MOVES_KEPT = 64
_BESIDE_KEPT = 25


class Pace:
    """The rung in force, and what moved it.

    Attributes:
        moves: the latest changes of the rung, oldest first.
        move_count: all of them.
        request_moves: those of the request under way, or of the last one.
        late_tokens: new tokens of that request that took longer than they may.
        beside_ms: what the latest new token took beside the engine.
    """

    def __init__(
        self,
        ladder: Sequence[KRung],
        use: Callable[[tuple[int, ...]], None],
        pacing: Pacing,
        clock: Callable[[], float] = time.monotonic,
        work: PromptWork | None = None,
    ) -> None:
        """Begin on the first rung.

        Args:
            ladder: the rungs; with more than one, each has a cost.
            use: puts a cap in force.
            pacing: what to keep to.
            clock: seconds that never go back.
            work: how the time of a prompt grows with its length; None as its tokens do.
        """
        self.ladder = tuple(ladder)
        self.moves: deque[KMove] = deque(maxlen=_MOVES_KEPT)
        self.move_count = 0
        self.request_moves: list[KMove] = []
        self.late_tokens = 0
        self._use = use
        self._pacing = pacing
        self._clock = clock
        self._work = work or PromptWork()
        decode = [1.0 if rung.cost is None else rung.cost.decode for rung in ladder]
        prefill = [1.0 if rung.cost is None else rung.cost.prefill for rung in ladder]
        self._costs = {"prompt": falling(prefill), "decode": falling(decode)}
        self._states = {"prompt": ControlState(), "decode": ControlState()}
        self._times: dict[str, list[float]] = {"prompt": [], "decode": []}
        self._read_at: float | None = None
        self._in_force = ladder[0]
        self._deepest = 0
        # When the request began, had nobody stopped it on the way, and the engine last ran.
        self._began = self._ran = clock()
        self._paused: float | None = None
        # What new tokens take beside the engine: choosing them, turning them into text.
        self.beside_ms = 0.0
        self._beside_ms: deque[float] = deque(maxlen=_BESIDE_KEPT)
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

    @property
    def deepest(self) -> KRung:
        """The lowest rung that anything of the request ran on."""
        return self.ladder[self._deepest]

    def begin(self, spent_seconds: float = 0.0) -> None:
        """Begin a request.

        Args:
            spent_seconds: time that it has taken already.
        """
        if self._held:
            return
        self._began = self._clock() - spent_seconds
        self._impossible = ""
        self._deepest = 0
        self.late_tokens = 0
        self.request_moves = []

    def pause(self) -> None:
        """Stop the request's clock: whoever reads a stream is busy with what came."""
        self._paused = self._clock()

    def resume(self) -> None:
        """Go on after `pause`."""
        if self._paused is not None:
            away = self._clock() - self._paused
            self._began += away
            self._ran += away
            self._paused = None

    def before_prompt(self, tokens: int, then: int, runs: int = 1) -> None:
        """Choose the rung for a prompt.

        Args:
            tokens: tokens that are about to run.
            then: new tokens that may follow.
            runs: of the engine, where they are more than the tokens need.
        """
        left, prompt = self._left_ms(), self._unit_ms("prompt")
        allowed = None
        if left is not None and prompt is not None:
            # A new token is not known to take less than a prompt of one.
            decode = self._unit_ms("decode") or self._work.of(1) * prompt
            allowed = share_of_prompt(
                left - then * self._beside(),
                (self._work.of(tokens, runs) * prompt, then * decode),
                (self._costs["prompt"][-1], self._costs["decode"][-1]),
            )
        self._choose(
            "prompt", None if allowed is None else allowed / self._work.of(tokens, runs)
        )

    def after_prompt(self, tokens: int, seconds: float, runs: int = 1) -> None:
        """Take in how long a prompt took."""
        self._take("prompt", 1000 * seconds / self._work.of(tokens, runs))

    def before_step(self, remaining: int) -> None:
        """Choose the rung for a new token.

        Args:
            remaining: new tokens that may still come, this one included.
        """
        self.beside_ms = 1000 * (self._clock() - self._ran)
        self._beside_ms.append(self.beside_ms)
        beside, left, each = self._beside(), self._left_ms(), self._pacing.token_ms
        self._choose(
            "decode",
            None if left is None else left / remaining - beside,
            None if each is None else each - beside,
        )

    def after_step(self, seconds: float) -> None:
        """Take in how long a new token took."""
        self._take("decode", 1000 * seconds)
        each = self._pacing.token_ms
        self.late_tokens += each is not None and 1000 * seconds + self.beside_ms > each

    def full_fits(self, tokens: int, new: int = 0, runs: int = 1) -> bool:
        """Ask whether a request can run once more, at the full k, in what is left.

        Args:
            tokens: tokens of the prompt; 0 once it has run.
            new: new tokens; the first one comes out of the prompt.
            runs: of the engine that the prompt needs.
        """
        if new > 1 and self._pacing.token_ms is not None and self._states["decode"].rung:
            # The controller has left the full k for new tokens that would not be in time.
            return False
        left = self._left_ms()
        if left is None:
            return True
        prompt, decode = self._unit_ms("prompt") or 0.0, self._unit_ms("decode") or 0.0
        steps = max(new - 1, 0)
        work = self._work.of(tokens, runs) if tokens else 0.0
        return work * prompt + steps * (decode + self._beside()) <= left * (
            1 - self._pacing.limits.headroom
        )

    def use_full(self) -> None:
        """Put the first rung in force, until the next choice."""
        self._put(0)

    @contextlib.contextmanager
    def held_at_full(self) -> Generator[None]:
        """Stay on the first rung, and forget no move, while a request runs once more."""
        moves, self._held = self.request_moves, True
        self.late_tokens = 0
        try:
            yield
        finally:
            self._held = False
            self.request_moves = moves

    def _left_ms(self) -> float | None:
        if self._pacing.deadline_ms is None:
            return None
        return self._pacing.deadline_ms - 1000 * (self._clock() - self._began)

    def _beside(self) -> float:
        return statistics.median(self._beside_ms) if self._beside_ms else 0.0

    def _unit_ms(self, phase: Phase) -> float | None:
        """Return the time of a token at the full k, as far as it was measured."""
        state, cost = self._states[phase], self._costs[phase]
        new = [took / cost[state.rung] for took in self._times[phase]]
        units = (*state.unit_ms, *new)[-3:]
        return statistics.median(units) if units else None

    def _take(self, phase: Phase, unit_ms: float) -> None:
        self._ran = self._clock()
        if not self._held:
            self._times[phase].append(unit_ms)

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
                troubles=state.troubles,
                over_current=state.over_current,
            )
            for name, other in self._states.items()
        }
        self._states[phase] = state
        if move is not None:
            self._note(phase, move)
        if state.impossible and not self._impossible:
            given = [each for each in (allowed_ms, each_ms) if each is not None]
            self._impossible = self._say_impossible(phase, costs[-1], min(given))
            _LOG.warning("%s", self._impossible)
        self._put(state.rung)
        self._deepest = max(self._deepest, state.rung)

    def _say_impossible(self, phase: Phase, cost: float, allowed_ms: float) -> str:
        takes = (
            f"a token of the {'prompt' if phase == 'prompt' else 'answer'} takes "
            f"{(self._unit_ms(phase) or 0.0) * cost:.2f} ms, "
            f"{max(allowed_ms, 0.0):.2f} are left for it"
        )
        if len(self.ladder) == 1:
            return f"too slow for the deadline, and this session stays on its rung: {takes}"
        return f"no rung is fast enough for the deadline: on the fastest {takes}"

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


def share_of_prompt(
    left_ms: float, full_ms: tuple[float, float], least: tuple[float, float]
) -> float:
    """Share what is left out between a prompt and the new tokens behind it.

    Args:
        left_ms: time for both.
        full_ms: what each takes at the full k, above 0 in the sum.
        least: what each costs on the last rung, over the full k, in (0, 1].

    Returns:
        Time for the prompt. Where both are too slow at the full k each saves as much of the
        rest as is its part of what can be saved; neither has less than it takes on the last
        rung, unless both together have.
    """
    prompt, decode = full_ms
    short = prompt + decode - left_ms
    saves = prompt * (1 - least[0]), decode * (1 - least[1])
    if short <= 0 or not sum(saves) > 0:
        return left_ms * prompt / (prompt + decode)
    return prompt - short * saves[0] / sum(saves)


def falling(costs: Sequence[float]) -> list[float]:
    """Return costs that fall from rung to rung, where they were measured not to."""
    # A rung that is on the ladder for its decode may save nothing on prompts.
    least = 1e-6
    return [
        most * (1 - least * rung)
        for rung, most in enumerate(itertools.accumulate((1.0, *costs[1:]), min))
    ]
