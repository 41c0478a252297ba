"""Answers the requests of one session, one at a time, on one engine."""

from __future__ import annotations

import logging
import time
from collections import deque
from dataclasses import replace
from operator import attrgetter
from typing import TYPE_CHECKING, Literal

from edgemoe_runtime.adaptive_k.adaptation import PromptWork
from edgemoe_runtime.adaptive_k.k_cap import check_k_cap
from edgemoe_runtime.adaptive_k.k_controller import Pace
from edgemoe_runtime.adaptive_k.rung_cost import measure_prompt_offset, time_rungs
from edgemoe_runtime.bundle.k_ladder import KRung
from edgemoe_runtime.decoding.answers import Classification, Generation, Score, meets_deadline
from edgemoe_runtime.decoding.decoder import Decoder
from edgemoe_runtime.decoding.generation import (
    GenerationProgress,
    GenerationRequest,
    TextStream,
    generate_pieces,
)
from edgemoe_runtime.decoding.scoring import Comparison, compare_completions, score_completions
from edgemoe_runtime.errors import RequestError
from edgemoe_runtime.fallback import Fallback
from edgemoe_runtime.stats import Tally

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from edgemoe_runtime.decoding.sampling import FloatArray
    from edgemoe_runtime.opening import OpenedTask

_COUNTED = {
    "total": attrgetter("log_likelihood"),
    "token": attrgetter("per_token"),
    "character": attrgetter("per_character"),
}
_LOG = logging.getLogger(__name__)
_FALLBACKS_KEPT = 64


class Service:
    """The decoder, the tokenizer and the pace of a session, and what they answered.

    Attributes:
        tally: what was answered so far.
        pace: the rung in force, and what moved it.
        decoder: runs the tokens.
    """

    def __init__(self, opened: OpenedTask) -> None:
        """Take over what `open_task` has made ready."""
        self.tally = Tally()
        self._opened = opened
        self._entry = opened.manifest.tasks[opened.task]
        self._turn = 0
        self._requested: deque[Fallback] = deque(maxlen=_FALLBACKS_KEPT)
        self.decoder = Decoder(
            opened.engine,
            opened.k_cap or self._full,
            top_k=self._entry.top_k,
            vocab_size=opened.manifest.model.vocab_size,
        )
        self._ladder: tuple[KRung, ...] | None = None
        self._timed_on = opened.engine.name
        self._is_fixed = False
        self._prompt_work = PromptWork(chunk_tokens=opened.engine.chunk_tokens)
        self.use_k_cap(opened.k_cap)

    @property
    def fallbacks(self) -> tuple[Fallback, ...]:
        """Engines that could not be used, and the latest of other kinds."""
        return (*self._opened.fallbacks, *self._opened.engine.fallbacks, *self._requested)

    @property
    def k_cap(self) -> tuple[int, ...]:
        """The cap in force, by MoE layer."""
        return self.pace.rung.k_cap

    def use_k_cap(self, k_cap: int | Sequence[int] | None) -> None:
        """Fix the cap for the requests that follow, or give it back to the ladder.

        Raises:
            RequestError: when it is outside [1, top_k] or has a wrong number of values.
        """
        self._is_fixed = k_cap is not None
        if k_cap is None:
            ladder = self._adaptive()
        else:
            caps = check_k_cap(k_cap, top_k=self._entry.top_k, layers=len(self._full))
            ladder = (KRung(name="fixed", k_cap=caps),)
        self.next_turn()
        self.decoder.use_k_cap(ladder[0].k_cap)
        self.pace = Pace(
            ladder, self.decoder.move_k_cap, self._opened.pacing, work=self._prompt_work
        )

    def stream(
        self, request: GenerationRequest, begin: float, check_open: Callable[[], None]
    ) -> TextStream:
        """Continue a prompt; the stream makes it piece by piece."""
        self.decoder.check(request.prompt)
        self._follow_engine()
        turn, pace = self.next_turn(), self.pace

        def check_turn() -> None:
            check_open()
            if self._turn != turn:
                raise RequestError(
                    "A stream must be read to its end before the session takes another"
                    " request. Open a second session to run two at once."
                )

        def finish(progress: GenerationProgress) -> Generation:
            return self._finish(request, progress)

        progress = GenerationProgress(tokens=[])
        pieces = generate_pieces(
            request, self.decoder, self._opened.tokenizer, progress, check_turn, pace
        )
        answer = TextStream(pieces, progress, finish)
        progress.seconds = time.perf_counter() - begin
        return answer

    def generate(
        self, request: GenerationRequest, begin: float, check_open: Callable[[], None]
    ) -> Generation:
        """Continue a prompt, and do it again at the full k where the answer is in doubt."""
        self.decoder.check(request.prompt)
        self._follow_engine()
        self.next_turn()
        request = replace(request, watched=self._margin("perplexity") is not None)
        pace = self.pace
        progress = GenerationProgress(tokens=[], seconds=time.perf_counter() - begin)
        self._make(request, progress, check_open)
        own = list(pace.fallbacks)
        doubt = self._doubt("perplexity", progress.lead / len(progress.tokens))
        if doubt:
            again = self._make_again(request, progress, check_open)
            does = "no time for full k" if again is None else "asked again at full k"
            own.append(Fallback(pace.deepest.name, f"{doubt}: {does}", "confidence"))
            if again is not None:
                self.tally.asked_again += 1
                progress = again
        progress.seconds = time.perf_counter() - begin
        progress.fallbacks = tuple(own)
        return self._finish(request, progress)

    def _make(
        self,
        request: GenerationRequest,
        progress: GenerationProgress,
        check: Callable[[], None],
    ) -> None:
        pieces = generate_pieces(
            request, self.decoder, self._opened.tokenizer, progress, check, self.pace
        )
        progress.text = "".join(pieces)

    def _make_again(
        self,
        request: GenerationRequest,
        first: GenerationProgress,
        check_open: Callable[[], None],
    ) -> GenerationProgress | None:
        """Answer at the full k; None where there is no time for it, or not for all of it."""
        pace, again = self.pace, GenerationProgress(tokens=[])
        if not pace.full_fits(len(request.prompt), len(first.tokens)):
            return None

        def check() -> None:
            check_open()
            # It may be a longer answer than the first, which was in time.
            if not pace.full_fits(0, 2):
                raise _NoTimeError

        try:
            with pace.held_at_full():
                self._make(request, again, check)
        except _NoTimeError:
            return None
        again.prefill_seconds += first.prefill_seconds
        again.k_moves = first.k_moves
        return again

    def _finish(self, request: GenerationRequest, progress: GenerationProgress) -> Generation:
        own = self._note(progress.fallbacks, progress.seconds)
        self._count(progress.seconds, len(progress.tokens))
        self.tally.late_tokens += progress.late_tokens
        engine, pacing = self._opened.engine, self._opened.pacing
        return Generation(
            text=progress.text,
            tokens=tuple(progress.tokens),
            prompt_tokens=len(request.prompt),
            new_tokens=len(progress.tokens),
            seconds=progress.seconds,
            prefill_seconds=progress.prefill_seconds,
            experts_per_token=progress.experts_per_token,
            k_cap=progress.k_cap,
            backend=engine.name,
            fallbacks=(*self._opened.fallbacks, *engine.fallbacks, *own),
            finish_reason=progress.finish_reason,
            deadline_ms=pacing.deadline_ms,
            token_ms=pacing.token_ms,
            late_tokens=progress.late_tokens,
            k_moves=progress.k_moves,
        )

    def _note(self, own: Sequence[Fallback], seconds: float) -> tuple[Fallback, ...]:
        """Log and remember what a request could not keep, and return it."""
        pacing = self._opened.pacing
        if pacing.token_ms is None and meets_deadline(seconds, pacing.deadline_ms):
            # It looked as if no rung was fast enough, and the answer was short.
            own = [fallback for fallback in own if fallback.kind != "deadline"]
        for fallback in own:
            if fallback.kind != "deadline":  # that one was told when it was seen
                _LOG.info("%s", fallback)
        self._requested.extend(own)
        return tuple(own)

    def classify(
        self,
        prompt: str,
        choices: Sequence[str],
        by: Literal["total", "token", "character"],
        begin: float,
    ) -> Classification:
        """Choose the choice that is the most likely continuation of a prompt.

        Args:
            prompt: the whole prompt.
            choices: what may follow it.
            by: what of a score counts.
            begin: when the request began.
        """
        comparison = self._compare(prompt, choices)
        scores = self._score_paced(comparison, begin)
        values = [_COUNTED[by](score) for score in scores]
        doubt = self._doubt("accuracy", _lead_of(scores, values.index(max(values))))
        own = list(self.pace.fallbacks)
        if doubt:
            fits = self.pace.full_fits(comparison.tokens, runs=comparison.runs)
            if fits:
                self.pace.use_full()
                scores = score_completions(self.decoder, comparison)
                values = [_COUNTED[by](score) for score in scores]
                self.tally.asked_again += 1
            does = "asked again at full k" if fits else "no time for full k"
            own.append(Fallback(self.pace.deepest.name, f"{doubt}: {does}", "confidence"))
        seconds = time.perf_counter() - begin
        kept = self._note(own, seconds)
        self._count(seconds, 0)
        return Classification(
            choices,
            scores,
            values,
            seconds=seconds,
            deadline_ms=self._opened.pacing.deadline_ms,
            experts_per_token=self.decoder.experts_per_token,
            k_cap=self.k_cap,
            fallbacks=(*self._opened.fallbacks, *self._opened.engine.fallbacks, *kept),
            k_moves=tuple(self.pace.request_moves),
        )

    def score(self, prompt: str, completion: str, begin: float) -> Score:
        """Return how likely a completion is after a prompt."""
        (score,) = self._score_paced(self._compare(prompt, [completion]), begin)
        seconds = time.perf_counter() - begin
        self._note(self.pace.fallbacks, seconds)
        self._count(seconds, 0)
        return score

    def token_logprobs(self, ids: Sequence[int], start: int) -> FloatArray:
        """Return how likely tokens are at the full k; see `Decoder.token_logprobs`."""
        self.next_turn()
        self.pace.use_full()
        return self.decoder.token_logprobs(ids, start)

    def next_turn(self) -> int:
        """Take the cache from whatever request has it."""
        self._turn += 1
        return self._turn

    @property
    def _full(self) -> tuple[int, ...]:
        """The cap that caps nothing, or what stands in for an allocator that is missing."""
        opened, own = self._opened, self._entry.k_ladder
        if opened.k_table is not None:
            return opened.k_table
        if own:
            return own[0].k_cap
        return (self._entry.top_k,) * len(opened.manifest.model.moe_layers)

    def _adaptive(self) -> tuple[KRung, ...]:
        """Return the ladder to move on: one rung where nothing asks for moves."""
        if self._ladder is None:
            opened, full = self._opened, self._full
            ladder = opened.manifest.ladder(opened.task)
            if not ladder or ladder[0].k_cap != full or opened.k_table is not None:
                ladder = (KRung(name="full", k_cap=full),)
            if not opened.adapts:
                ladder = ladder[:1]
            self._ladder = ladder if len(ladder) == 1 else self._made_ready(ladder)
        return self._ladder

    def _made_ready(self, ladder: tuple[KRung, ...]) -> tuple[KRung, ...]:
        """Warm the engine up, and measure costs that could not be where it was exported."""
        engine, vocab_size = self._opened.engine, self._opened.manifest.model.vocab_size
        if not ladder[-1].cost or engine.name != self._timed_on:
            ladder = time_rungs(engine, ladder, vocab_size)
            _LOG.info("costs of the k ladder, measured here: %s", ladder)
        # A cold prompt is slower than any after it, and would be taken for a slow machine.
        offset = measure_prompt_offset(engine, ladder[0], vocab_size)
        self._prompt_work = replace(self._prompt_work, offset=offset)
        return ladder

    def _follow_engine(self) -> None:
        """Time the rungs again where another engine has taken over since."""
        if self._is_fixed or self._opened.engine.name == self._timed_on:
            return
        self._ladder = None
        self.use_k_cap(None)
        self._timed_on = self._opened.engine.name

    def _compare(self, prompt: str, completions: Sequence[str]) -> Comparison:
        self._follow_engine()
        self.next_turn()
        return compare_completions(self.decoder, self._opened.tokenizer, prompt, completions)

    def _score_paced(self, comparison: Comparison, began: float) -> list[Score]:
        """Score completions on the rung that the controller wants."""
        self.pace.begin(time.perf_counter() - began)
        self.pace.before_prompt(comparison.tokens, 0, comparison.runs)
        begin = time.perf_counter()
        scores = score_completions(self.decoder, comparison)
        self.pace.after_prompt(comparison.tokens, time.perf_counter() - begin, comparison.runs)
        return scores

    def _margin(self, metric: str) -> float | None:
        """Return how far ahead answers must be on any rung, where that was measured."""
        qualities = [rung.quality for rung in self.pace.ladder if rung.quality is not None]
        margins = [each.margin for each in qualities if each.metric == metric]
        return max((margin for margin in margins if margin is not None), default=None)

    def _doubt(self, metric: str, lead: float) -> str:
        """Say why the answer may be another at the full k, if it may."""
        rung = self.pace.deepest
        if rung is self.pace.ladder[0] or rung.quality is None:
            return ""
        quality = rung.quality
        if quality.margin is None or quality.metric != metric or lead > quality.margin:
            return ""
        return f"ahead by {lead:.3g} nats, more than {quality.margin:.3g} needed"

    def _count(self, seconds: float, new_tokens: int) -> None:
        self.tally.add(seconds, new_tokens, self._opened.pacing.deadline_ms)


class _NoTimeError(Exception):
    """A second answer would be late."""


def _lead_of(scores: Sequence[Score], best: int) -> float:
    """Return how far a choice is ahead of the others, in nats; below 0 where it is not."""
    totals = [score.log_likelihood for score in scores]
    others = totals[:best] + totals[best + 1 :]
    return totals[best] - max(others) if others else float("inf")
