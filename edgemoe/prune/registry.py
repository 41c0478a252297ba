"""The pruning methods by name, and the one call that makes a plan of statistics."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from edgemoe import __version__
from edgemoe.errors import PlanError, StatisticsError
from edgemoe.prune.frequency import frequency
from edgemoe.prune.keep import check_counts
from edgemoe.prune.plan import LayerPlan, Plan
from edgemoe.prune.random import random
from edgemoe.prune.reap import reap
from edgemoe.prune.uncurl import uncurl

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from edgemoe.calibrate.statistics import Statistics, TaskStatistics
    from edgemoe.models.contract import ModelShape

    Method: TypeAlias = Callable[
        [TaskStatistics, ModelShape, Sequence[int], int], tuple[LayerPlan, ...]
    ]

METHODS: dict[str, Method] = {
    "frequency": frequency,
    "random": random,
    "reap": reap,
    "uncurl": uncurl,
}
# Named by the interface, and not there yet.
_LATER = ("moe-i2", "naee", "ream", "seer")


def find_method(name: str) -> Method:
    """Find a method by name.

    Args:
        name: Its name.

    Returns:
        The method.

    Raises:
        PlanError: There is no such method in this version.
    """
    if name in METHODS:
        return METHODS[name]
    available = ", ".join(sorted(METHODS))
    if name in _LATER:
        raise PlanError(
            f"the method must be available in edgemoe {__version__}, got {name!r}, which a "
            f"later version brings. Available: {available}."
        )
    raise PlanError(f"the method must be one of {available}, got {name!r}.")


def make_plan(
    statistics: Statistics, task: str, method: str, counts: Sequence[int], *, seed: int = 0
) -> Plan:
    """Decide which experts a task keeps: a pure function of its arguments.

    Args:
        statistics: Sums of the checkpoint.
        task: The task to decide for.
        method: One of :data:`METHODS`.
        counts: Experts to keep per MoE layer, as :func:`edgemoe.prune.keep.count_kept` gives.
        seed: Seed of the methods that draw, in [0, inf).

    Returns:
        The plan, checked against the shape that the statistics were measured on.

    Raises:
        PlanError: The method, a count or the seed is out of range.
        StatisticsError: The task was not calibrated, or on no token.
    """
    decide = find_method(method)
    if seed < 0:
        raise PlanError(f"the seed must be in [0, inf), got {seed}.")
    counts = check_counts(statistics.shape, counts)
    if statistics.task(task).tokens == 0:
        raise StatisticsError(
            f"statistics must cover a token of the task, got none of {task!r}. Merge the "
            "other shards in first."
        )
    plan = Plan(
        method=method,
        layers=decide(statistics.task(task), statistics.shape, counts, seed),
        checkpoint_sha256=statistics.checkpoint_sha256,
        statistics_sha256=statistics.sha256,
        task=task,
        seed=seed,
        options={"keep_experts": list(counts)},
        edgemoe_version=__version__,
    )
    plan.validate(statistics.shape)
    return plan
