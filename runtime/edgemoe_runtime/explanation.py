"""Description of a session: engine, fall-backs, ladder position, deadlines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgemoe_runtime.adaptive_k.k_cap import compact, ladder_position

if TYPE_CHECKING:
    from edgemoe_runtime.adaptive_k.adaptation import KMove
    from edgemoe_runtime.fallback import Fallback
    from edgemoe_runtime.json_fields import Json
    from edgemoe_runtime.opening import OpenedTask
    from edgemoe_runtime.session_state import SessionState

_SHOWN_MOVES = 5


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Description of how a session runs, and why.

    Attributes:
        bundle: path of the bundle.
        task: name of the task.
        model: name of the model.
        target: target that the bundle was exported for.
        precision: of the weights.
        backend: engine and provider in use.
        fallbacks: engines that were tried before it or failed, and the latest requests of low
            confidence or of a deadline that no rung could keep, with reasons.
        k_cap: cap of experts per token, by MoE layer.
        ladder_position: name of the ladder's rung with these caps, or None.
        ladder: names of the rungs that the session moves on.
        k_moves: the latest changes of the cap, oldest first, with reasons.
        k_move_count: number of all changes.
        top_k: experts per token at full quality.
        experts_per_token: experts per token and MoE layer, averaged over the latest request;
            before the first, the mean that the caps allow.
        threads: CPU threads asked for, or None where the engine chooses.
        max_length: tokens that fit into the cache.
        kv_cache: form of the cache.
        load_seconds: time that opening took.
        verified: whether digests were compared on opening.
        requests: number of requests answered.
        last_seconds: time of the last one, or None.
        mean_seconds: mean time of a request, or None.
        new_tokens: tokens that all requests generated together.
        asked_again: requests that were escalated to the full k, for want of confidence.
        deadline_ms: deadline of a request, or None.
        deadlines_met: requests that ended in time.
        token_ms: time that a new token may take, or None.
        late_tokens: new tokens that took longer than that.
    """

    bundle: str
    task: str
    model: str
    target: str
    precision: str
    backend: str
    fallbacks: tuple[Fallback, ...]
    k_cap: tuple[int, ...]
    ladder_position: str | None
    ladder: tuple[str, ...]
    k_moves: tuple[KMove, ...]
    k_move_count: int
    top_k: int
    experts_per_token: float
    threads: int | None
    max_length: int
    kv_cache: str
    load_seconds: float
    verified: bool
    requests: int
    last_seconds: float | None
    mean_seconds: float | None
    new_tokens: int
    asked_again: int
    deadline_ms: float | None
    deadlines_met: int
    token_ms: float | None
    late_tokens: int

    def __str__(self) -> str:
        lines = [
            f"task      {self.task} of {self.model} ({self.precision}, for {self.target})",
            f"backend   {self.backend}, opened in {self.load_seconds:.2f} s"
            + ("" if self.verified else ", digests not compared"),
        ]
        lines += [f"  not     {fallback}" for fallback in self.fallbacks]
        rung = f"rung {self.ladder_position}" if self.ladder_position else "no rung"
        lines.append(
            f"experts   {self.experts_per_token:.3g} of {self.top_k} per token"
            f" (k_cap {compact(self.k_cap)}, {rung} of the ladder)"
        )
        threads = "engine's choice" if self.threads is None else str(self.threads)
        lines.append(
            f"limits    {self.max_length} tokens ({self.kv_cache} cache), threads: {threads}"
        )
        if len(self.ladder) > 1 or self.k_moves:
            lines.append(f"ladder    {' > '.join(self.ladder)}, {self.k_move_count} moves")
            lines += [f"  {move}" for move in self.k_moves[-_SHOWN_MOVES:]]
        kept: list[str] = []
        if self.deadline_ms is not None:
            kept.append(f"{self.deadlines_met} within {self.deadline_ms:g} ms")
        if self.token_ms is not None:
            kept.append(f"{self.late_tokens} new tokens later than {self.token_ms:g} ms")
        lines.append(f"requests  {self.requests}, {', '.join(kept) or 'no deadline'}")
        if self.mean_seconds is not None:
            lines.append(
                f"          {self.mean_seconds:.3g} s and {self.new_tokens / self.requests:.3g}"
                f" new tokens each, {self.asked_again} asked again at full k"
            )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Json]:
        """Convert to JSON.

        Returns:
            One key for each attribute.
        """
        return {
            "bundle": self.bundle,
            "task": self.task,
            "model": self.model,
            "target": self.target,
            "precision": self.precision,
            "backend": self.backend,
            "fallbacks": [dict(fallback.to_dict()) for fallback in self.fallbacks],
            "k_cap": list(self.k_cap),
            "ladder_position": self.ladder_position,
            "ladder": list(self.ladder),
            "k_moves": [move.to_dict() for move in self.k_moves],
            "k_move_count": self.k_move_count,
            "top_k": self.top_k,
            "experts_per_token": self.experts_per_token,
            "threads": self.threads,
            "max_length": self.max_length,
            "kv_cache": self.kv_cache,
            "load_seconds": self.load_seconds,
            "verified": self.verified,
            "requests": self.requests,
            "last_seconds": self.last_seconds,
            "mean_seconds": self.mean_seconds,
            "new_tokens": self.new_tokens,
            "asked_again": self.asked_again,
            "deadline_ms": self.deadline_ms,
            "deadlines_met": self.deadlines_met,
            "token_ms": self.token_ms,
            "late_tokens": self.late_tokens,
        }


def describe(opened: OpenedTask, state: SessionState, load_seconds: float) -> Explanation:
    """Describe a session.

    Args:
        opened: its task, engine and settings.
        state: what its requests share.
        load_seconds: time that opening took.
    """
    manifest, stats, controller = opened.manifest, state.stats, state.controller
    return Explanation(
        bundle=str(opened.bundle),
        task=opened.task,
        model=manifest.model.name,
        target=manifest.target,
        precision=manifest.precision,
        backend=opened.engine.name,
        fallbacks=state.fallbacks,
        k_cap=controller.rung.k_cap,
        ladder_position=ladder_position(manifest, opened.task, controller.rung.k_cap),
        ladder=tuple(rung.name for rung in controller.ladder),
        k_moves=tuple(controller.moves),
        k_move_count=controller.move_count,
        top_k=manifest.tasks[opened.task].top_k,
        experts_per_token=state.decoder.experts_per_token,
        threads=opened.threads,
        max_length=opened.engine.max_length,
        kv_cache=manifest.kv_cache.form,
        load_seconds=load_seconds,
        verified=opened.verified,
        requests=stats.requests,
        last_seconds=stats.last_seconds,
        mean_seconds=stats.seconds / stats.requests if stats.requests else None,
        new_tokens=stats.new_tokens,
        asked_again=stats.escalated,
        deadline_ms=opened.adaptation.deadline_ms,
        deadlines_met=stats.deadlines_met,
        token_ms=opened.adaptation.token_ms,
        late_tokens=stats.late_tokens,
    )
