"""What a recovery can be told, and what is taken where nothing is said."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from edgemoe.errors import RecoveryError

TEACHER_OPTIONS = frozenset({"kd_weight", "temperature"})
# What a method in closed form has no use for.
OF_STEPS = ("steps", "learning_rate", "batch_tokens", "seed")


@dataclass(frozen=True, kw_only=True)
class RecoverOptions:
    """Options of a recovery; None stands for the method's own value.

    Attributes:
        steps: Optimizer steps at most, in [1, inf).
        learning_rate: Highest learning rate, in (0, 1].
        batch_tokens: Tokens of a step, in [2, inf); the line that reaches it is not cut.
        sequence_length: Longest sequence in tokens, in [2, 2048]; texts are cut at 512.
        max_tokens: Tokens of each task to train on at most, in [2, inf).
        held_out_fraction: Share of each task's lines that training never sees, in (0, 0.5]. By
            default they are those that `edgemoe export` judges a task by.
        seed: Of the order of the lines and of what is drawn, in [0, 2^31).
        kd_weight: Share of the teacher's divergence in the loss, in [0, 1]; the rest is the
            task's cross-entropy.
        temperature: What both models' logits are divided by in the divergence, in (0, inf).
        rank: Rank of the adapters, in [1, inf).
        alpha: Their scale: they add `alpha / rank` times their product; in (0, inf).
        router_steps: Steps in which the routers train alone, in [1, steps).
    """

    steps: int = 200
    learning_rate: float | None = None
    batch_tokens: int = 2048
    sequence_length: int = 512
    max_tokens: int | None = None
    held_out_fraction: float = 0.25
    seed: int = 0
    kd_weight: float | None = None
    temperature: float | None = None
    rank: int | None = None
    alpha: float | None = None
    router_steps: int | None = None

    def __post_init__(self) -> None:
        rate, share = self.learning_rate, self.kd_weight
        self._check("steps", self.steps >= 1, "[1, inf)")
        self._check("learning_rate", rate is None or 0 < rate <= 1, "(0, 1]")
        self._check("batch_tokens", self.batch_tokens >= 2, "[2, inf)")
        self._check("sequence_length", 2 <= self.sequence_length <= 2048, "[2, 2048]")
        self._check("max_tokens", self.max_tokens is None or self.max_tokens >= 2, "[2, inf)")
        self._check("held_out_fraction", 0 < self.held_out_fraction <= 0.5, "(0, 0.5]")
        self._check("seed", 0 <= self.seed < 2**31, "[0, 2^31)")
        self._check("kd_weight", share is None or 0 <= share <= 1, "[0, 1]")
        self._check("rank", self.rank is None or self.rank >= 1, "[1, inf)")
        for name in ("temperature", "alpha"):
            value = getattr(self, name)
            good = value is None or (value > 0 and math.isfinite(value))
            self._check(name, good, "(0, inf)")
        last = self.router_steps is None or 1 <= self.router_steps < self.steps
        self._check("router_steps", last, f"[1, steps={self.steps})")

    def _check(self, name: str, good: bool, interval: str) -> None:
        if not good:
            raise RecoveryError(f"{name} must be in {interval}, got {getattr(self, name)}.")

    def to_dict(self) -> dict[str, Any]:
        """Return what was decided, as JSON values."""
        unused = OF_STEPS if self.learning_rate is None else ()
        return {
            name: value
            for name, value in asdict(self).items()
            if value is not None and name not in unused
        }
