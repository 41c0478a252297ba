"""The cuts of a sweep: every method at every fraction, for every task, with every seed."""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgemoe.errors import PlanError, SweepError
from edgemoe.plans.plan import Plan
from edgemoe.prune.registry import count_for, find_method
from edgemoe.sweep.methods import method_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgemoe.models.shapes import ModelShape
    from edgemoe.sweep.request import SweepRequest


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One plan to make and to judge.

    Attributes:
        task: The task that chooses the experts.
        method: How; a name as `edgemoe.sweep.request.read_methods` gives it.
        keep: Fraction of each layer's experts, or of all channels, to keep, (0, 1].
        seed: Seed of the method.
        counts: Experts to keep per MoE layer, or channels of each expert.
        options: The method's options.
    """

    task: str
    method: str
    keep: float
    seed: int
    counts: tuple[int, ...]
    options: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Name of its plan file, without the suffix."""
        return f"{self.task}-{self.method}-{self.keep:g}-{self.seed}"

    @property
    def key(self) -> str:
        """Name of its plan among finished work, which may be of several sweeps."""
        content = json.dumps([self.counts, dict(self.options)], sort_keys=True)
        return f"{self.name}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"


@dataclass(frozen=True)
class Impossible:
    """A fraction that the model cannot keep, by one method at least.

    Attributes:
        keep: The fraction.
        reason: Why.
    """

    keep: float
    reason: str


def list_candidates(
    request: SweepRequest, shape: ModelShape
) -> tuple[list[Candidate], list[Impossible]]:
    """List what a sweep has to make and judge.

    A router cannot choose from fewer experts than a token uses: fractions below that are left
    out, so that the same list of fractions serves any model.

    Args:
        request: What was asked for.
        shape: The model.

    Returns:
        Cuts by task, method, falling fraction and seed; methods that do not draw have one
        seed, 0. And the fractions that were left out.

    Raises:
        PlanError: There is no such method.
        SweepError: No fraction is possible.
    """
    counts: dict[tuple[str, float], tuple[int, ...]] = {}
    impossible: list[Impossible] = []
    keeps = sorted(request.keeps, reverse=True)
    for keep, method in itertools.product(keeps, request.methods):
        found = _count_or_reason(method, shape, keep)
        if not isinstance(found, Impossible):
            counts[method, keep] = found
        elif found not in impossible:
            impossible.append(found)
    seeds = {
        name: tuple(request.seeds) if find_method(method_of(name)).stochastic else (0,)
        for name in request.methods
    }
    if not counts:
        raise SweepError(
            f"--keep must have a fraction that the model can keep, got none in "
            f"{', '.join(f'{keep:g}' for keep in request.keeps)}: {impossible[0].reason}"
        )
    candidates = [
        Candidate(
            task=task,
            method=method,
            keep=keep,
            seed=seed,
            counts=counts[method, keep],
            options=options,
        )
        for task in request.tasks
        for method, options in request.methods.items()
        for keep in keeps
        if (method, keep) in counts
        for seed in seeds[method]
    ]
    return candidates, impossible


def _count_or_reason(
    method: str, shape: ModelShape, keep: float
) -> tuple[int, ...] | Impossible:
    try:
        return count_for(method_of(method), shape, keep)
    except PlanError as error:
        return Impossible(keep, str(error))


def hash_decision(plan: Plan) -> str:
    """Hash what a plan decides, whoever decided it.

    Args:
        plan: The plan.

    Returns:
        SHA-256 in hexadecimal: equal for plans that keep and merge the same experts
        and channels.
    """
    return Plan(method="", layers=plan.layers, factors=plan.factors).sha256
