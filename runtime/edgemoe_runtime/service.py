"""Answers the requests of one session, one at a time: texts, choices and scores."""

from __future__ import annotations

import time
from dataclasses import replace
from operator import attrgetter
from typing import TYPE_CHECKING, Literal

from edgemoe_runtime.adaptive_k.confidence import is_margin_known
from edgemoe_runtime.decoding.answers import Classification, Generation, Score
from edgemoe_runtime.decoding.generation import (
    GenerationProgress,
    GenerationRequest,
    TextStream,
    generate_pieces,
)
from edgemoe_runtime.decoding.scoring import (
    Comparison,
    compare_completions,
    margin_over_second,
    score_completions,
)
from edgemoe_runtime.errors import RequestError
from edgemoe_runtime.session_state import SessionState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from edgemoe_runtime.decoding.sampling import FloatArray
    from edgemoe_runtime.opening import OpenedTask

_COUNTED = {
    "total": attrgetter("log_likelihood"),
    "token": attrgetter("per_token"),
    "character": attrgetter("per_character"),
}


class Service:
    """Answers the requests of one session, one at a time.

    Attributes:
        state: what the requests share.
    """

    def __init__(self, opened: OpenedTask) -> None:
        """Take over a task that `open_task` has made ready.

        Args:
            opened: the task, its engine and the session's settings.
        """
        self.state = SessionState(opened)
        self._opened = opened

    def stream(
        self, request: GenerationRequest, begin: float, check_open: Callable[[], None]
    ) -> TextStream:
        """Continue a prompt piece by piece, as the stream is read.

        Args:
            request: prompt, limits and sampling.
            begin: when the request began, by `time.perf_counter`.
            check_open: raises when the session is closed.
        """
        self.state.decoder.check(request.prompt)
        claim = self.state.begin_request()

        def check_claim() -> None:
            check_open()
            if self.state.claim != claim:
                raise RequestError(
                    "A stream must be read to its end before the session takes another"
                    " request. Open a second session to run two at once."
                )

        def finish(progress: GenerationProgress) -> Generation:
            return self._finish(request, progress)

        progress = GenerationProgress(tokens=[])
        answer = TextStream(self._pieces(request, progress, check_claim), progress, finish)
        progress.seconds = time.perf_counter() - begin
        return answer

    def generate(
        self, request: GenerationRequest, begin: float, check_open: Callable[[], None]
    ) -> Generation:
        """Continue a prompt, and escalate an answer of low confidence to the full k.

        Args:
            request: prompt, limits and sampling.
            begin: when the request began, by `time.perf_counter`.
            check_open: raises when the session is closed.
        """
        state = self.state
        state.decoder.check(request.prompt)
        state.begin_request()
        needs_margin = is_margin_known(state.controller.ladder, "perplexity")
        request = replace(request, needs_margin=needs_margin)
        progress = GenerationProgress(tokens=[], seconds=time.perf_counter() - begin)
        progress.text = "".join(self._pieces(request, progress, check_open))
        fallbacks = list(state.controller.fallbacks)
        mean_margin = progress.margin_sum / len(progress.tokens)
        reason = state.low_confidence("perplexity", mean_margin)
        if reason:
            escalated = self._escalate(request, progress, check_open)
            fallbacks.append(state.confidence_fallback(reason, escalated=escalated is not None))
            progress = escalated or progress
        progress.seconds = time.perf_counter() - begin
        progress.fallbacks = tuple(fallbacks)
        return self._finish(request, progress)

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
            by: which value of a score counts.
            begin: when the request began, by `time.perf_counter`.
        """
        state = self.state
        comparison = self._compare(prompt, choices)
        scores = self._score(comparison, begin)
        values = [_COUNTED[by](score) for score in scores]
        margin = margin_over_second(scores, values.index(max(values)))
        reason = state.low_confidence("accuracy", margin)
        fallbacks = list(state.controller.fallbacks)
        if reason:
            fits = state.controller.full_k_fits(comparison.tokens, runs=comparison.runs)
            if fits:
                state.controller.use_full_k()
                scores = score_completions(state.decoder, comparison)
                values = [_COUNTED[by](score) for score in scores]
            fallbacks.append(state.confidence_fallback(reason, escalated=fits))
        seconds = time.perf_counter() - begin
        kept = state.end_request(fallbacks, seconds)
        return Classification(
            choices,
            scores,
            values,
            seconds=seconds,
            deadline_ms=self._opened.adaptation.deadline_ms,
            experts_per_token=state.decoder.experts_per_token,
            k_cap=state.k_cap,
            fallbacks=(*state.engine_fallbacks, *kept),
            k_moves=tuple(state.controller.request_moves),
        )

    def score(self, prompt: str, completion: str, begin: float) -> Score:
        """Return the likelihood of a completion after a prompt.

        Args:
            prompt: the whole prompt.
            completion: what may follow it.
            begin: when the request began, by `time.perf_counter`.
        """
        (score,) = self._score(self._compare(prompt, [completion]), begin)
        self.state.end_request(self.state.controller.fallbacks, time.perf_counter() - begin)
        return score

    def token_logprobs(self, ids: Sequence[int], start: int) -> FloatArray:
        """Return log-likelihoods at the full k; see `Decoder.token_logprobs`."""
        self.state.claim_cache()
        self.state.controller.use_full_k()
        return self.state.decoder.token_logprobs(ids, start)

    def _pieces(
        self,
        request: GenerationRequest,
        progress: GenerationProgress,
        check: Callable[[], None],
    ) -> Iterator[str]:
        state = self.state
        return generate_pieces(
            request, state.decoder, self._opened.tokenizer, progress, check, state.controller
        )

    def _escalate(
        self,
        request: GenerationRequest,
        first: GenerationProgress,
        check_open: Callable[[], None],
    ) -> GenerationProgress | None:
        """Answer at the full k; None where there is no time for it, or not for all of it."""
        controller, second = self.state.controller, GenerationProgress(tokens=[])
        if not controller.full_k_fits(len(request.prompt), len(first.tokens)):
            return None

        def check() -> None:
            check_open()
            # It may be a longer answer than the first, which was in time.
            if not controller.full_k_fits(0, 2):
                raise _NoTimeError

        try:
            with controller.pinned_to_full_k():
                second.text = "".join(self._pieces(request, second, check))
        except _NoTimeError:
            return None
        second.prefill_seconds += first.prefill_seconds
        second.k_moves = first.k_moves
        return second

    def _finish(self, request: GenerationRequest, progress: GenerationProgress) -> Generation:
        new_tokens = len(progress.tokens)
        kept = self.state.end_request(progress.fallbacks, progress.seconds, new_tokens)
        self.state.stats.late_tokens += progress.late_tokens
        config = self._opened.adaptation
        return Generation(
            text=progress.text,
            tokens=tuple(progress.tokens),
            prompt_tokens=len(request.prompt),
            new_tokens=new_tokens,
            seconds=progress.seconds,
            prefill_seconds=progress.prefill_seconds,
            experts_per_token=progress.experts_per_token,
            k_cap=progress.k_cap,
            backend=self._opened.engine.name,
            fallbacks=(*self.state.engine_fallbacks, *kept),
            finish_reason=progress.finish_reason,
            deadline_ms=config.deadline_ms,
            token_ms=config.token_ms,
            late_tokens=progress.late_tokens,
            k_moves=progress.k_moves,
        )

    def _compare(self, prompt: str, completions: Sequence[str]) -> Comparison:
        state = self.state
        state.begin_request()
        return compare_completions(state.decoder, self._opened.tokenizer, prompt, completions)

    def _score(self, comparison: Comparison, began: float) -> list[Score]:
        """Score completions on the rung that the controller chooses."""
        controller = self.state.controller
        controller.begin(time.perf_counter() - began)
        controller.before_prompt(comparison.tokens, 0, comparison.runs)
        begin = time.perf_counter()
        scores = score_completions(self.state.decoder, comparison)
        seconds = time.perf_counter() - begin
        controller.after_prompt(comparison.tokens, seconds, comparison.runs)
        return scores


class _NoTimeError(Exception):
    """An escalated answer would be late."""
