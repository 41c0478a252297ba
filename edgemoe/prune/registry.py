"""The pruning methods by name, and the one call that makes a plan."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from edgemoe.calibrate.mixture import mix
from edgemoe.data_provenance import write_digests
from edgemoe.errors import PlanError
from edgemoe.plans.options import options_of, parse_options
from edgemoe.plans.plan import LayerPlan, Plan
from edgemoe.prune.camera import camera
from edgemoe.prune.frequency import frequency
from edgemoe.prune.heapr import heapr
from edgemoe.prune.keep import check_counts, count_kept
from edgemoe.prune.moe_i2 import moe_i2
from edgemoe.prune.msan import man, msan
from edgemoe.prune.naee import naee
from edgemoe.prune.owl import LAYER_OPTIONS, Owl
from edgemoe.prune.random import random
from edgemoe.prune.ream import ream
from edgemoe.prune.reap import reap
from edgemoe.prune.seer import seer
from edgemoe.prune.selection import keep_by_score
from edgemoe.prune.uncurl import uncurl
from edgemoe.prune.widths import check_widths, count_widths
from edgemoe.versions import __version__

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from edgemoe.calibrate.sample import Window
    from edgemoe.calibrate.statistics import Statistics
    from edgemoe.calibrate.sums import LayerSums
    from edgemoe.calibrate.task_statistics import TaskStatistics
    from edgemoe.models.shapes import ModelShape
    from edgemoe.oracle.oracle import LayerOracle

    # Opens the model for methods that run its layers.
    OpenOracle: TypeAlias = Callable[[Sequence[Window]], LayerOracle]


@dataclass(frozen=True)
class PruningMethod:
    """A pruning method.

    Attributes:
        decide: From statistics, shape, counts and seed to layers' plans; a method that runs
            layers has the oracle before them. Options are keyword arguments.
        needs_forward: Whether it needs the model besides the statistics.
        stochastic: Whether another seed may give another plan.
        parallel: Whether it asks its oracle through
            `edgemoe.oracle.oracle.LayerOracle.map`, so that workers can answer.
        allocates_layers: Whether it decides itself how many experts each layer keeps; only
            their sum counts then.
        prunes_width: Whether it keeps all experts and chooses their channels; counts are
            channels of each expert then.
    """

    decide: Callable[..., tuple[LayerPlan, ...]]
    needs_forward: bool = False
    stochastic: bool = False
    parallel: bool = False
    allocates_layers: bool = False
    prunes_width: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Options by name, with their defaults."""
        return options_of(self.decide)


def scoring(score: Callable[[LayerSums], NDArray[np.float64]]) -> PruningMethod:
    """Make a method of a score: each layer keeps the experts of the highest.

    Args:
        score: From the sums of one layer of E experts to a score each, float64 `[E]`.

    Returns:
        The method. Of equal scores the expert of lower id stays; routers with groups keep as
        many experts of each.
    """

    def decide(
        statistics: TaskStatistics, shape: ModelShape, counts: Sequence[int], seed: int
    ) -> tuple[LayerPlan, ...]:
        del seed
        return keep_by_score(statistics, shape, counts, score)

    return PruningMethod(decide)


METHODS: dict[str, PruningMethod] = {
    "camera": PruningMethod(camera, needs_forward=True, prunes_width=True),
    "frequency": scoring(frequency),
    "heapr": PruningMethod(heapr, needs_forward=True, prunes_width=True),
    "man": scoring(man),
    "moe-i2": PruningMethod(
        moe_i2, needs_forward=True, stochastic=True, parallel=True, allocates_layers=True
    ),
    "msan": scoring(msan),
    "naee": PruningMethod(naee, needs_forward=True, parallel=True),
    "random": PruningMethod(random, stochastic=True),
    "reap": scoring(reap),
    "ream": PruningMethod(ream, needs_forward=True),
    "seer": scoring(seer),
    "uncurl": PruningMethod(uncurl, stochastic=True),
}


def find_method(name: str) -> PruningMethod:
    """Find a method by name.

    Args:
        name: Its name.

    Returns:
        The method.

    Raises:
        PlanError: There is no such method.
    """
    if name not in METHODS:
        raise PlanError(f"the method must be one of {', '.join(METHODS)}, got {name!r}.")
    return METHODS[name]


def read_options(method: str, texts: Sequence[str]) -> dict[str, Any]:
    """Read a method's options as a command line gives them.

    Args:
        method: The method's name.
        texts: `NAME=VALUE` each.

    Returns:
        The options by name, in the types of their defaults.

    Raises:
        PlanError: The method has no such option, or the value is of another type.
    """
    given = parse_options(method, find_method(method).options | LAYER_OPTIONS, texts)
    find_owl(method, given)
    return given


def find_owl(method: str, options: Mapping[str, Any]) -> Owl | None:
    """Read from a method's options how many experts each layer keeps.

    Args:
        method: The method's name.
        options: Its options by name, and those of `edgemoe.prune.owl.LAYER_OPTIONS`.

    Returns:
        OWL's settings; None where layers keep what they are told.

    Raises:
        PlanError: A setting is out of range, or the method shares out experts itself.
    """
    owl = Owl.from_options(options)
    if owl is not None and find_method(method).prunes_width:
        raise PlanError(
            f"--layers must be uniform for {method}, which keeps all experts, got owl. "
            "Leave it out."
        )
    if (
        owl is not None
        and find_method(method).allocates_layers
        and options.get("ratios") != "given"
    ):
        raise PlanError(
            f"--layers must be uniform for {method}, which decides itself how many experts "
            "each layer keeps, got owl. Leave it out, or add --set ratios=given."
        )
    return owl


def needs_model(method: str, options: Mapping[str, Any]) -> bool:
    """Return whether a plan needs the model besides the statistics.

    Args:
        method: The method's name.
        options: As in `find_owl`.

    Returns:
        Whether the method runs layers, or OWL does.
    """
    return find_method(method).needs_forward or find_owl(method, options) is not None


def fill_options(method: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Add the defaults to options that are given.

    Args:
        method: The method's name.
        given: As in `find_owl`.

    Returns:
        All options that the decision depends on: those of layers only where OWL decides.
    """
    own = {name: value for name, value in given.items() if name not in LAYER_OPTIONS}
    owl = {} if find_owl(method, given) is None else {**LAYER_OPTIONS, **given}
    return {**find_method(method).options, **own, **owl}


def count_for(method: str, shape: ModelShape, keep: float) -> tuple[int, ...]:
    """Turn a fraction into what a method keeps per MoE layer.

    Args:
        method: One of `METHODS`.
        shape: The model.
        keep: Fraction of each layer's experts, or of all channels, in (0, 1].

    Returns:
        Experts to keep, or channels of each expert, one number per MoE layer.

    Raises:
        PlanError: There is no such method, or the model cannot keep that fraction.
    """
    if find_method(method).prunes_width:
        return count_widths(shape, keep)
    return count_kept(shape, keep=keep)


def make_plan(
    statistics: Statistics,
    task: str | Mapping[str, float],
    method: str,
    counts: Sequence[int],
    *,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    open_oracle: OpenOracle | None = None,
) -> Plan:
    """Decide which experts a task keeps: the same arguments give the same plan.

    Args:
        statistics: Sums of the checkpoint.
        task: The task to decide for, or several with their weights.
        method: One of `METHODS`.
        counts: Experts to keep per MoE layer, as `edgemoe.prune.keep.count_kept` gives,
            or channels of each expert, as `edgemoe.prune.widths.count_widths` gives.
        seed: Seed of the methods that draw, in [0, inf).
        options: The method's options by name, and those of
            `edgemoe.prune.owl.LAYER_OPTIONS`.
        open_oracle: Opens the model that was measured, for methods that run its layers and
            for OWL.

    Returns:
        The plan, checked against the shape that the statistics were measured on.

    Raises:
        PlanError: The method, a count, an option or the seed is out of range.
        StatisticsError: The task was not calibrated, or on no token.
        StreamingError: The method cannot run this model's layers.
    """
    found = find_method(method)
    given = dict(options or {})
    if seed < 0:
        raise PlanError(f"the seed must be in [0, inf), got {seed}.")
    unknown = sorted(set(given) - set(found.options) - set(LAYER_OPTIONS))
    if unknown:
        raise PlanError(f"{method} must be given its own options, got {unknown}.")
    owl = find_owl(method, given)
    check = check_widths if found.prunes_width else check_counts
    asked = counts = check(statistics.shape, counts)
    weights = {task: 1.0} if isinstance(task, str) else dict(task)
    mixture = mix(statistics, weights)
    measured = mixture.measured
    own = {name: value for name, value in given.items() if name not in LAYER_OPTIONS}
    decide = found.decide
    if needs_model(method, given):
        if open_oracle is None:
            raise PlanError(f"{method} must have the model to run its layers, got statistics.")
        oracle = open_oracle(mixture.windows)
        if owl is not None:
            counts = owl.count_kept(oracle, statistics.shape, counts)
        if found.needs_forward:
            decide = functools.partial(decide, oracle)
    layers = decide(measured, statistics.shape, counts, seed, **own)
    counted = "keep_neurons" if found.prunes_width else "keep_experts"
    chosen: dict[str, Any] = {counted: list(asked), **fill_options(method, given)}
    if len(weights) > 1:
        chosen["task_weights"] = weights
    plan = Plan(
        method=method,
        layers=layers,
        checkpoint_sha256=statistics.checkpoint_sha256,
        statistics_sha256=statistics.sha256,
        task="+".join(weights),
        seed=seed,
        options=chosen,
        edgemoe_version=__version__,
        calibration_lines=write_digests(mixture.digests),
    )
    plan.validate(statistics.shape)
    return plan
