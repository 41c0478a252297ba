"""The k ladder of a session: the rungs of its task, with costs of the engine in use."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from edgemoe_runtime.adaptive_k.prompt_cost import PromptCost
from edgemoe_runtime.adaptive_k.rung_cost import measure_prompt_offset, time_rungs
from edgemoe_runtime.bundle.k_ladder import KRung

if TYPE_CHECKING:
    from edgemoe_runtime.backends.base import Backend
    from edgemoe_runtime.bundle.manifest import Manifest

_LOG = logging.getLogger(__name__)


class SessionLadder:
    """The rungs that a session moves on, prepared when they are first needed.

    Attributes:
        full_k: the cap that caps nothing, by MoE layer, or the fallback table of a graph that
            cannot choose k itself.
        prompt_cost: cost of a prompt on the engine in use.
    """

    def __init__(
        self,
        engine: Backend,
        manifest: Manifest,
        task: str,
        *,
        fallback_table: tuple[int, ...] | None,
        adapts: bool,
    ) -> None:
        """Take the ladder of a task; nothing is measured yet.

        Args:
            engine: the engine of the session; another one may take over within it.
            manifest: the bundle's.
            task: the task.
            fallback_table: fixed caps that replace a missing choice of k by token, or None.
            adapts: whether the session moves; one that does not has a single rung.
        """
        entry = manifest.tasks[task]
        layers = len(manifest.model.moe_layers)
        if fallback_table is not None:
            self.full_k = fallback_table
        elif entry.k_ladder:
            self.full_k = entry.k_ladder[0].k_cap
        else:
            self.full_k = (entry.top_k,) * layers
        ladder = manifest.ladder(task)
        if not ladder or ladder[0].k_cap != self.full_k or fallback_table is not None:
            ladder = (KRung(name="full", k_cap=self.full_k),)
        self.prompt_cost = PromptCost(chunk_tokens=engine.chunk_tokens)
        self._exported = ladder if adapts else ladder[:1]
        self._engine = engine
        self._vocab_size = manifest.model.vocab_size
        self._prepared: tuple[KRung, ...] | None = None
        # Costs of the bundle are those of the engine that the session opened with.
        self._costs_of = engine.name
        self._must_measure = not ladder[-1].cost

    @property
    def is_stale(self) -> bool:
        """Whether another engine has taken over since the rungs were prepared."""
        return self._engine.name != self._costs_of

    def rungs(self) -> tuple[KRung, ...]:
        """Return the rungs, the full k first; with more than one, each has a cost.

        Raises:
            BackendError: when the engine fails while it is measured.
        """
        if self.is_stale:
            self._costs_of = self._engine.name
            self._prepared = None
            self._must_measure = True
        if self._prepared is None:
            self._prepared = self._prepare()
        return self._prepared

    def _prepare(self) -> tuple[KRung, ...]:
        """Warm the engine up, and measure costs that the bundle does not have for it."""
        ladder = self._exported
        if len(ladder) == 1:
            return ladder
        if self._must_measure:
            ladder = time_rungs(self._engine, ladder, self._vocab_size)
            _LOG.info("costs of the k ladder, measured here: %s", ladder)
        # A cold prompt is slower than any after it, and would pass for a slow machine.
        offset = measure_prompt_offset(self._engine, ladder[0], self._vocab_size)
        self.prompt_cost = PromptCost(offset=offset, chunk_tokens=self._engine.chunk_tokens)
        return ladder
