"""The controller of a session: measures, asks for a decision, and puts the rung in force.

The decision itself is a pure function of numbers (`edgemoe_runtime.adaptive_k.decision`). This
is where the numbers come from: times of prompts and of new tokens, what is left of the
deadline, and a reading of the sensors, once a second at most. Prompts and new tokens have a
state each, for a rung that saves time on the one may save little on the other; the machine's
pressure acts on both.
"""

from __future__ import annotations

import contextlib
import logging
import statistics
import time
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING

from edgemoe_runtime.adaptive_k.adaptation import KMove
from edgemoe_runtime.adaptive_k.decision import ControlState, Signals, decide
from edgemoe_runtime.adaptive_k.prompt_cost import PromptCost, prompt_share_ms
from edgemoe_runtime.adaptive_k.rung_cost import decreasing_costs
from edgemoe_runtime.fallback import Fallback

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from edgemoe_runtime.adaptive_k.adaptation import AdaptationConfig, Phase
    from edgemoe_runtime.adaptive_k.decision import Move
    from edgemoe_runtime.bundle.k_ladder import KRung
    from edgemoe_runtime.device.sensors import Sensors

_LOG = logging.getLogger(__name__)
_READ_SECONDS = 1.0
_MOVES_KEPT = 64
_OVERHEADS_KEPT = 25


class KController:
    """Keeps the requests of a session on the rung that the decision wants.

    Attributes:
        moves: the latest changes of the rung, oldest first.
        move_count: number of all changes.
        request_moves: those of the request under way, or of the last one.
        late_tokens: new tokens of that request that took longer than `token_ms`.
        host_overhead_ms: time of the latest new token outside the engine: choosing it, turning
            it into text.
    """

    def __init__(
        self,
        ladder: Sequence[KRung],
        use: Callable[[tuple[int, ...]], None],
        config: AdaptationConfig,
        clock: Callable[[], float] = time.monotonic,
        prompt_cost: PromptCost | None = None,
    ) -> None:
        """Begin on the first rung.

        Args:
            ladder: the rungs; with more than one, each has a cost.
            use: puts a cap in force.
            config: deadlines and limits to keep.
            clock: seconds that never go back.
            prompt_cost: how the time of a prompt grows with its length; None for in
                proportion to its tokens.
        """
        self.ladder = tuple(ladder)
        self.moves: deque[KMove] = deque(maxlen=_MOVES_KEPT)
        self.move_count = 0
        self.request_moves: list[KMove] = []
        self.late_tokens = 0
        self._use = use
        self._config = config
        self._clock = clock
        self._prompt_cost = prompt_cost or PromptCost()
        decode = [1.0 if rung.cost is None else rung.cost.decode for rung in ladder]
        prefill = [1.0 if rung.cost is None else rung.cost.prefill for rung in ladder]
        self._costs = {"prompt": decreasing_costs(prefill), "decode": decreasing_costs(decode)}
        self._states = {"prompt": ControlState(), "decode": ControlState()}
        self._times: dict[str, list[float]] = {"prompt": [], "decode": []}
        self._read_at: float | None = None
        self._in_force = ladder[0]
        self._lowest = 0
        # When the request began, less the pauses, and when the engine last ran.
        self._began = self._ran = clock()
        self._paused: float | None = None
        self.host_overhead_ms = 0.0
        self._overheads_ms: deque[float] = deque(maxlen=_OVERHEADS_KEPT)
        self._infeasible = ""
        self._pinned = False

    @property
    def rung(self) -> KRung:
        """The rung in force."""
        return self._in_force

    @property
    def fallbacks(self) -> tuple[Fallback, ...]:
        """The deadline of the request that no rung can keep, if that is so."""
        if not self._infeasible:
            return ()
        return (Fallback(self._in_force.name, self._infeasible, kind="deadline"),)

    @property
    def lowest_rung(self) -> KRung:
        """The lowest rung that anything of the request ran on."""
        return self.ladder[self._lowest]

    @property
    def has_left_full_k(self) -> bool:
        """Whether anything of the request ran on another rung than the first."""
        return self._lowest > 0

    def begin(self, spent_seconds: float = 0.0) -> None:
        """Begin a request.

        Args:
            spent_seconds: time that it has taken already.
        """
        if self._pinned:
            return
        self._began = self._clock() - spent_seconds
        self._infeasible = ""
        self._lowest = 0
        self.late_tokens = 0
        self.request_moves = []

    def pause(self) -> None:
        """Stop the request's clock: the reader of a stream is busy with the latest piece."""
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
        left, prompt = self._remaining_ms(), self._full_k_ms("prompt")
        allowed = None
        if left is not None and prompt is not None:
            # A new token is not known to take less than a prompt of one.
            decode = self._full_k_ms("decode") or self._prompt_cost.in_tokens(1) * prompt
            allowed = prompt_share_ms(
                left - then * self._host_overhead(),
                (self._prompt_cost.in_tokens(tokens, runs) * prompt, then * decode),
                (self._costs["prompt"][-1], self._costs["decode"][-1]),
            )
        self._choose(
            "prompt",
            None if allowed is None else allowed / self._prompt_cost.in_tokens(tokens, runs),
        )

    def after_prompt(self, tokens: int, seconds: float, runs: int = 1) -> None:
        """Record the time of a prompt.

        Args:
            tokens: tokens that ran.
            seconds: time that they took.
            runs: of the engine, where they are more than the tokens need.
        """
        self._record_time("prompt", 1000 * seconds / self._prompt_cost.in_tokens(tokens, runs))

    def before_step(self, remaining: int) -> None:
        """Choose the rung for a new token.

        Args:
            remaining: new tokens that may still come, this one included.
        """
        self.host_overhead_ms = 1000 * (self._clock() - self._ran)
        self._overheads_ms.append(self.host_overhead_ms)
        overhead = self._host_overhead()
        left, each = self._remaining_ms(), self._config.token_ms
        self._choose(
            "decode",
            None if left is None else left / remaining - overhead,
            None if each is None else each - overhead,
        )

    def after_step(self, seconds: float) -> None:
        """Record the time of a new token.

        Args:
            seconds: time that the engine took.
        """
        self._record_time("decode", 1000 * seconds)
        each = self._config.token_ms
        self.late_tokens += each is not None and 1000 * seconds + self.host_overhead_ms > each

    def full_k_fits(self, tokens: int, new: int = 0, runs: int = 1) -> bool:
        """Return whether a request can run once more, at the full k, in the time left.

        Args:
            tokens: tokens of the prompt; 0 once it has run.
            new: new tokens; the first one comes out of the prompt.
            runs: of the engine that the prompt needs.
        """
        if new > 1 and self._config.token_ms is not None and self._states["decode"].rung:
            # The full k has been left because its new tokens would be late.
            return False
        left = self._remaining_ms()
        if left is None:
            return True
        prompt, decode = self._full_k_ms("prompt") or 0.0, self._full_k_ms("decode") or 0.0
        steps = max(new - 1, 0)
        prompt_tokens = self._prompt_cost.in_tokens(tokens, runs) if tokens else 0.0
        return prompt_tokens * prompt + steps * (decode + self._host_overhead()) <= left * (
            1 - self._config.limits.headroom
        )

    def use_full_k(self) -> None:
        """Put the first rung in force, until the next choice."""
        self._activate(0)

    @contextlib.contextmanager
    def pinned_to_full_k(self) -> Generator[None]:
        """Stay on the first rung while a request runs once more; keep the moves it made."""
        moves, self._pinned = self.request_moves, True
        self.late_tokens = 0
        try:
            yield
        finally:
            self._pinned = False
            self.request_moves = moves

    def _remaining_ms(self) -> float | None:
        if self._config.deadline_ms is None:
            return None
        return self._config.deadline_ms - 1000 * (self._clock() - self._began)

    def _host_overhead(self) -> float:
        return statistics.median(self._overheads_ms) if self._overheads_ms else 0.0

    def _full_k_ms(self, phase: Phase) -> float | None:
        """Return the latest time of a token at the full k in ms, or None before any."""
        state, cost = self._states[phase], self._costs[phase]
        new = [took / cost[state.rung] for took in self._times[phase]]
        times = (*state.full_k_ms, *new)[-3:]
        return statistics.median(times) if times else None

    def _record_time(self, phase: Phase, milliseconds: float) -> None:
        self._ran = self._clock()
        if not self._pinned:
            self._times[phase].append(milliseconds)

    def _choose(
        self, phase: Phase, allowed_ms: float | None, each_ms: float | None = None
    ) -> None:
        if self._pinned:
            self._activate(0)
            return
        now, costs = self._clock(), self._costs[phase]
        signals = Signals(
            seconds=now,
            token_ms=tuple(self._times[phase]),
            allowed_ms=allowed_ms,
            each_ms=each_ms,
            sensors=self._read_sensors(now),
        )
        self._times[phase] = []
        state, move = decide(self._states[phase], signals, costs, self._config.limits)
        # The machine's pressure acts on prompts and new tokens alike.
        self._states = {
            name: replace(
                other,
                pressure=state.pressure,
                pressure_at=state.pressure_at,
                alerts=state.alerts,
                over_current=state.over_current,
            )
            for name, other in self._states.items()
        }
        self._states[phase] = state
        if move is not None:
            self._record_move(phase, move)
        if state.infeasible and not self._infeasible:
            given = [each for each in (allowed_ms, each_ms) if each is not None]
            self._infeasible = self._infeasible_reason(phase, costs[-1], min(given))
            _LOG.warning("%s", self._infeasible)
        self._activate(state.rung)
        self._lowest = max(self._lowest, state.rung)

    def _infeasible_reason(self, phase: Phase, cost: float, allowed_ms: float) -> str:
        takes = (
            f"a token of the {'prompt' if phase == 'prompt' else 'answer'} takes "
            f"{(self._full_k_ms(phase) or 0.0) * cost:.2f} ms, "
            f"{max(allowed_ms, 0.0):.2f} are left for it"
        )
        if len(self.ladder) == 1:
            return f"too slow for the deadline, and this session stays on its rung: {takes}"
        return f"no rung is fast enough for the deadline: on the fastest {takes}"

    def _read_sensors(self, now: float) -> Sensors | None:
        if self._config.read is None:
            return None
        if self._read_at is not None and now - self._read_at < _READ_SECONDS:
            return None
        self._read_at = now
        return self._config.read()

    def _activate(self, rung: int) -> None:
        wanted = self.ladder[rung]
        if wanted is not self._in_force:
            self._in_force = wanted
            self._use(wanted.k_cap)

    def _record_move(self, phase: Phase, move: Move) -> None:
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
