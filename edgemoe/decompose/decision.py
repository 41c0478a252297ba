"""Put ranks into a plan: the one call that `edgemoe decompose` makes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from edgemoe.calibrate.mixture import spread_windows
from edgemoe.data_provenance import read_digests, write_digests
from edgemoe.decompose.importance import expert_importance
from edgemoe.decompose.ranks import Product, share_out, skew, spread
from edgemoe.decompose.registry import find_method
from edgemoe.decompose.shared_basis import RANK_MULTIPLE, largest_rank, stored_parameters
from edgemoe.decompose.theoretical_loss import kept_fractions, measure_losses
from edgemoe.errors import PlanError, StatisticsError
from edgemoe.models.layers.factored import product_shapes
from edgemoe.oracle.oracle import LayerOracle
from edgemoe.plans.factors import EmbeddedSample, Factors
from edgemoe.plans.layer_plan import BASIS_MULTIPLE
from edgemoe.plans.options import parse_options
from edgemoe.versions import __version__

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from edgemoe.calibrate.statistics import Statistics
    from edgemoe.decompose.walk import Prepare
    from edgemoe.layerwise.provider import LayerProvider
    from edgemoe.models.layers.layer import MoeLayer
    from edgemoe.plans.plan import Plan

_RANK_OPTIONS: dict[str, Any] = {"importance": "uniform", "layers": "equal", "multiple": 8}
_BASIS_OPTIONS: dict[str, Any] = {"multiple": RANK_MULTIPLE}
_SAMPLE_OPTIONS: dict[str, Any] = {"tokens": 8192}
_IMPORTANCE_TOKENS = 512


@dataclass(frozen=True, kw_only=True)
class RankedPlan:
    """A plan with ranks, and what it costs.

    Attributes:
        plan: The plan.
        parameters_before: Parameters of the routed experts that it keeps, whole.
        parameters_after: The same, factored, as they are stored.
    """

    plan: Plan
    parameters_before: int
    parameters_after: int

    @property
    def ratio(self) -> float:
        """Fraction of the parameters that is stored."""
        return self.parameters_after / self.parameters_before


def method_options(method: str) -> dict[str, Any]:
    """Name the options of a decomposition.

    Args:
        method: Its name.

    Returns:
        Options with their defaults: how ranks are chosen, the sample, the method's own.

    Raises:
        PlanError: There is no such decomposition.
    """
    found = find_method(method)
    sample = _SAMPLE_OPTIONS if found.reads_tokens else {}
    ranks = _BASIS_OPTIONS if found.shares_bases else _RANK_OPTIONS
    return {**ranks, **sample, **found.options}


def read_options(method: str, texts: Sequence[str]) -> dict[str, Any]:
    """Read a decomposition's options as a command line gives them.

    Args:
        method: Its name.
        texts: `NAME=VALUE` each.

    Returns:
        The options by name.

    Raises:
        PlanError: There is no such option, or the value is of another type.
    """
    return parse_options(method, method_options(method), texts)


def add_ranks(
    plan: Plan,
    layers: Sequence[MoeLayer],
    statistics: Statistics,
    task: str,
    method: str,
    ratio: float,
    *,
    open_layers: Callable[[], LayerProvider],
    prepare: Prepare,
    options: Mapping[str, Any] | None = None,
) -> RankedPlan:
    """Decide the ranks of every expert that a plan keeps.

    Args:
        plan: Experts to keep and merge, validated for the checkpoint that was measured.
        layers: The checkpoint's MoE layers, possibly on the meta device.
        statistics: Sums of the checkpoint, and the tokens that they are of.
        task: Task to decide for.
        method: One of `edgemoe.decompose.registry.METHODS`.
        ratio: Fraction of the parameters of the kept routed experts that may be stored, in
            (0, 1].
        open_layers: Opens the model, for options that run its layers.
        prepare: Makes what a plan keeps and merges of a layer.
        options: Of `method_options`.

    Returns:
        The plan with ranks.

    Raises:
        PlanError: The checkpoint or the plan is factored already, or the method, an option or
            the ratio is out of range.
        StatisticsError: The task was not calibrated, or on no token.
        StreamingError: An option runs the model's layers, which cannot be done.
    """
    known = method_options(method)
    chosen = known | dict(options or {})
    if set(chosen) != set(known):
        raise PlanError(
            f"{method} must be given its own options, got {sorted(set(chosen) - set(known))}."
        )
    _refuse_factored(plan, layers)
    sample = _take_sample(statistics, task, chosen.get("tokens"))
    factors = Factors(
        method=method,
        options={"param_ratio": ratio, **chosen},
        task=task,
        statistics_sha256=statistics.sha256,
        edgemoe_version=__version__,
        sample=sample,
    )
    measured = statistics.task(task)
    lines = read_digests(plan.calibration_lines or "") | measured.digests
    plan = replace(plan, calibration_lines=write_digests(lines))
    if find_method(method).shares_bases:
        return _share_bases(plan, statistics.checkpoint_sha256, layers, factors, ratio)
    importance = expert_importance(
        chosen["importance"],
        plan,
        measured,
        lambda: LayerOracle(
            open_layers(), spread_windows(measured.windows, _IMPORTANCE_TOKENS)
        ),
    )
    budget = _Budget(
        plan,
        statistics.checkpoint_sha256,
        layers,
        factors,
        importance,
        ratio,
        chosen["multiple"],
    )
    if chosen["layers"] not in ("equal", "loss"):
        raise PlanError(f"layers must be equal or loss, got {chosen['layers']!r}.")
    found = budget.spend([(1.0, 1.0)] * len(layers))
    if chosen["layers"] == "loss":
        losses = measure_losses(open_layers(), found.plan, prepare)
        fractions = [kept_fractions(group, ratio) for group in zip(*losses, strict=True)]
        found = budget.spend(list(zip(*fractions, strict=True)))
    return found


def _share_bases(
    plan: Plan,
    checkpoint_sha256: str,
    layers: Sequence[MoeLayer],
    factors: Factors,
    ratio: float,
) -> RankedPlan:
    """Choose for every layer the largest bases that the ratio allows."""
    multiple = int(factors.options["multiple"])
    if multiple < 1 or multiple % BASIS_MULTIPLE:
        raise PlanError(
            f"multiple must be a multiple of {BASIS_MULTIPLE} for shared bases, got {multiple}."
        )
    ranked, before, after = [], 0, 0
    for layer, layer_plan in zip(layers, plan.layers, strict=True):
        count = len(layer_plan.experts)
        rank = largest_rank(layer, ratio, multiple=multiple, experts=count)
        ranked.append(replace(layer_plan, ranks=((rank, rank),) * count))
        before += stored_parameters(layer, experts=count)
        after += stored_parameters(layer, rank, experts=count)
    return RankedPlan(
        plan=replace(
            plan,
            layers=tuple(ranked),
            factors=factors,
            checkpoint_sha256=checkpoint_sha256,
        ),
        parameters_before=before,
        parameters_after=after,
    )


def _refuse_factored(plan: Plan, layers: Sequence[MoeLayer]) -> None:
    factored = [layer.index for layer in layers if layer.is_factored or layer.is_based]
    if factored:
        raise PlanError(
            f"experts must be whole to be factored, got layers {factored}, which are factored "
            "already or share bases. Start from the checkpoint that they were made from."
        )
    if plan.prunes_width:
        raise PlanError(
            "a plan must keep all neurons of its experts to be given ranks, got one of "
            f"{plan.method} that chooses them. Apply it first, then calibrate and decompose "
            "what that writes."
        )
    if plan.factors is not None:
        raise PlanError(
            "a plan must have no ranks to be given some, got those of "
            f"{plan.factors.method}. Start from the plan of `edgemoe prune`."
        )


def _take_sample(
    statistics: Statistics, task: str, tokens: int | None
) -> EmbeddedSample | None:
    measured = statistics.task(task)
    if measured.tokens == 0:
        raise StatisticsError(
            f"statistics must cover a token of the task, got none of {task!r}. Merge the "
            "other shards in first."
        )
    if tokens is None:
        return None
    if tokens < 1:
        raise PlanError(f"tokens must be an integer in [1, inf), got {tokens}.")
    if not measured.windows:
        raise StatisticsError(
            f"statistics must hold the tokens of {task!r} for a method that looks at them, got "
            "none. Calibrate again."
        )
    return EmbeddedSample.of(spread_windows(measured.windows, tokens))


@dataclass(frozen=True)
class _Budget:
    """All that decides ranks but how layers compare."""

    plan: Plan
    checkpoint_sha256: str
    layers: Sequence[MoeLayer]
    factors: Factors
    importance: Sequence[Sequence[float]]
    ratio: float
    multiple: int

    def spend(self, weights: Sequence[tuple[float, ...]]) -> RankedPlan:
        """Choose every expert's ranks in proportion to the weights of its products."""
        products: list[Product] = []
        fixed = 0
        for layer, plan, scores, pair in zip(
            self.layers, self.plan.layers, self.importance, weights, strict=True
        ):
            count = len(plan.experts)
            shapes = product_shapes(layer)
            # Biases stay as they are: one number for each output.
            fixed += count * sum(rows for rows, _ in shapes) * layer.layout.has_bias
            products.extend(
                Product(experts=count, rows=rows, columns=columns, weight=weight * skew(scores))
                for (rows, columns), weight in zip(shapes, pair, strict=True)
            )
        stored = share_out(products, self.ratio, multiple=self.multiple, fixed=fixed)
        layers = tuple(
            replace(
                plan,
                ranks=tuple(
                    zip(
                        spread(stored[2 * number], self.importance[number]),
                        spread(stored[2 * number + 1], self.importance[number]),
                        strict=True,
                    )
                ),
            )
            for number, plan in enumerate(self.plan.layers)
        )
        return RankedPlan(
            plan=replace(
                self.plan,
                layers=layers,
                factors=self.factors,
                checkpoint_sha256=self.checkpoint_sha256,
            ),
            parameters_before=fixed + sum(product.parameters for product in products),
            parameters_after=fixed
            + sum(
                product.per_rank * rank for product, rank in zip(products, stored, strict=True)
            ),
        )
