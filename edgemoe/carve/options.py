"""What carving can be told, and what is taken where nothing is said. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from edgemoe.errors import CarveError

WINDOW = 256
"""Tokens per calibration window."""


@dataclass(frozen=True, kw_only=True)
class CarveOptions:
    """Options of carving.

    Attributes:
        experts: Routed experts per layer, at least 2.
        shared_fraction: Wanted share of channels that every token uses, in `(0, 1)`; the
            nearest share that divides evenly is taken.
        top_k: Routed experts per token, in `[1, experts]`.
        max_tokens: Calibration tokens to read at most, at least 512.
        seed: Decides the calibration windows and the first cluster centres, in [0, inf).
    """

    experts: int = 16
    shared_fraction: float = 1 / 3
    top_k: int = 6
    max_tokens: int = 8192
    seed: int = 0

    def __post_init__(self) -> None:
        if self.experts < 2:
            raise CarveError(f"--experts must be at least 2, got {self.experts}.")
        if not 1 <= self.top_k <= self.experts:
            raise CarveError(
                f"--top-k must be between 1 and the {self.experts} experts, got {self.top_k}. "
                "Choose fewer experts per token."
            )
        if not 0.0 < self.shared_fraction < 1.0:
            raise CarveError(
                "--shared-fraction must be between 0 and 1, both excluded, got "
                f"{self.shared_fraction}."
            )
        if self.max_tokens < 2 * WINDOW:
            raise CarveError(
                f"--max-tokens must be at least {2 * WINDOW}, got {self.max_tokens}: "
                "fewer tokens say too little about the experts."
            )
        if self.seed < 0:
            raise CarveError(f"--seed must be in [0, inf), got {self.seed}.")
