"""State that the requests of a session share: cache, k ladder, controller, statistics."""

from __future__ import annotations

import logging
from collections import deque
from typing import TYPE_CHECKING

from edgemoe_runtime.adaptive_k.confidence import find_low_confidence
from edgemoe_runtime.adaptive_k.k_cap import check_k_cap
from edgemoe_runtime.adaptive_k.k_controller import KController
from edgemoe_runtime.adaptive_k.session_ladder import SessionLadder
from edgemoe_runtime.bundle.k_ladder import KRung
from edgemoe_runtime.decoding.answers import meets_deadline
from edgemoe_runtime.decoding.decoder import Decoder
from edgemoe_runtime.fallback import Fallback
from edgemoe_runtime.stats import SessionStats

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgemoe_runtime.bundle.manifest import Manifest
    from edgemoe_runtime.opening import OpenedTask

_LOG = logging.getLogger(__name__)
_FALLBACKS_KEPT = 64


def computes_in_half(manifest: Manifest) -> bool:
    """Return whether the activations of a bundle's graphs are in float16.

    Args:
        manifest: that of the bundle.
    """
    return manifest.precision == "fp16" or manifest.kv_cache.dtype == "float16"


class SessionState:
    """State that the requests of a session share.

    Attributes:
        stats: counts of the requests so far.
        decoder: runs the tokens.
        controller: chooses the rung of the k ladder.
        claim: number of the request that has the cache; another one has lost it.
    """

    def __init__(self, opened: OpenedTask) -> None:
        """Take over a task that `open_task` has made ready.

        Args:
            opened: the task, its engine and the session's settings.
        """
        self.stats = SessionStats()
        self.claim = 0
        self._opened = opened
        self._top_k = opened.manifest.tasks[opened.task].top_k
        self._ladder = SessionLadder(
            opened.engine,
            opened.manifest,
            opened.task,
            fallback_table=opened.fallback_table,
            adapts=opened.adapts,
        )
        self.decoder = Decoder(
            opened.engine,
            opened.k_cap or self._ladder.full_k,
            top_k=self._top_k,
            vocab_size=opened.manifest.model.vocab_size,
            name_of=opened.tokenizer.token,
            half=computes_in_half(opened.manifest),
            longest=opened.manifest.model.max_position_embeddings,
        )
        self._request_fallbacks: deque[Fallback] = deque(maxlen=_FALLBACKS_KEPT)
        self._is_fixed = False
        self.use_k_cap(opened.k_cap)

    @property
    def k_cap(self) -> tuple[int, ...]:
        """The cap in force, by MoE layer."""
        return self.controller.rung.k_cap

    @property
    def engine_fallbacks(self) -> tuple[Fallback, ...]:
        """Engines that could not be used, and a missing choice of k by token."""
        return (*self._opened.fallbacks, *self._opened.engine.fallbacks)

    @property
    def fallbacks(self) -> tuple[Fallback, ...]:
        """Those of the engine, and the latest of requests."""
        return (*self.engine_fallbacks, *self._request_fallbacks)

    def use_k_cap(self, k_cap: int | Sequence[int] | None) -> None:
        """Fix the cap for the requests that follow, or give it back to the ladder.

        Args:
            k_cap: one cap, one per MoE layer, or None for the ladder.

        Raises:
            RequestError: when it is outside [1, top_k] or has a wrong number of values.
        """
        if k_cap is None:
            ladder = self._ladder.rungs()
        else:
            caps = check_k_cap(k_cap, top_k=self._top_k, layers=len(self._ladder.full_k))
            ladder = (KRung(name="fixed", k_cap=caps),)
        self._is_fixed = k_cap is not None
        self.claim_cache()
        self.decoder.use_k_cap(ladder[0].k_cap)
        self.controller = KController(
            ladder,
            self.decoder.move_k_cap,
            self._opened.adaptation,
            prompt_cost=self._ladder.prompt_cost,
        )

    def claim_cache(self) -> int:
        """Take the cache from the request that has it; return the number of the new claim."""
        self.claim += 1
        return self.claim

    def begin_request(self) -> int:
        """Claim the cache; measure the ladder again where another engine has taken over."""
        if not self._is_fixed and self._ladder.is_stale:
            self.use_k_cap(None)
        return self.claim_cache()

    def low_confidence(self, metric: str, margin: float) -> str:
        """Return why an answer may be another one at the full k, or "".

        Args:
            metric: `perplexity` for texts, `accuracy` for choices.
            margin: how far the answer is ahead of the second best, in nats.
        """
        if not self.controller.has_left_full_k:
            return ""
        return find_low_confidence(self.controller.lowest_rung, metric, margin)

    def confidence_fallback(self, reason: str, *, escalated: bool) -> Fallback:
        """Count an answer of low confidence.

        Args:
            reason: why its confidence is low.
            escalated: whether there was time to answer at the full k.
        """
        self.stats.escalated += escalated
        outcome = "asked again at full k" if escalated else "no time for full k"
        return Fallback(self.controller.lowest_rung.name, f"{reason}: {outcome}", "confidence")

    def end_request(
        self, fallbacks: Sequence[Fallback], seconds: float, new_tokens: int = 0
    ) -> tuple[Fallback, ...]:
        """Count a request, and log and remember its fallbacks.

        Args:
            fallbacks: of the request.
            seconds: its wall-clock time.
            new_tokens: tokens that it generated.

        Returns:
            The fallbacks, without a deadline that was met in the end.
        """
        config = self._opened.adaptation
        if config.token_ms is None and meets_deadline(seconds, config.deadline_ms):
            # No rung looked fast enough for an answer of full length; this one was shorter.
            fallbacks = [fallback for fallback in fallbacks if fallback.kind != "deadline"]
        for fallback in fallbacks:
            if fallback.kind != "deadline":  # those are logged where they are found
                _LOG.info("%s", fallback)
        self._request_fallbacks.extend(fallbacks)
        self.stats.add(seconds, new_tokens, config.deadline_ms)
        return tuple(fallbacks)
