"""naee: the experts whose absence moves a layer's output least (Lu et al., 2024).

"Not All Experts are Equal", https://arxiv.org/abs/2402.14800: per layer, among all sets S of r
experts, the one of the smallest reconstruction error ::

    || F(X) - F_S(X) ||_F

with the router restricted to S and its gates renormalised as the family does. All sets are
tried where they are few (`exhaustive`, 20000 by default: 16 choose 8 are 12870); beyond,
experts are removed one by one, each time the one whose removal costs least, and then exchanged
for removed ones while that helps. Layers are judged on the unpruned model's inputs, as in the
paper.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgemoe.oracle.reconstruction import Reconstruction
from edgemoe.prune.selection import keep_set, router_groups

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgemoe.calibrate.task_statistics import TaskStatistics
    from edgemoe.models.shapes import LayerShape, ModelShape
    from edgemoe.oracle.oracle import LayerOracle
    from edgemoe.plans.plan import LayerPlan


def naee(
    oracle: LayerOracle,
    statistics: TaskStatistics,
    shape: ModelShape,
    counts: Sequence[int],
    seed: int,
    *,
    tokens: int = 1024,
    exhaustive: int = 20_000,
) -> tuple[LayerPlan, ...]:
    """Keep the set of the smallest reconstruction error of each layer.

    Args:
        oracle: The model and the task's tokens.
        statistics: Not used.
        shape: The model.
        counts: Experts to keep per MoE layer.
        seed: Not used: the method has no chance in it.
        tokens: How many tokens to judge on, in [1, inf).
        exhaustive: Most sets of a layer that are all tried, in [0, inf).

    Returns:
        One plan per MoE layer.
    """
    del statistics, seed
    jobs = [
        _SearchJob(layer, count, exhaustive)
        for layer, count in zip(shape.layers, counts, strict=True)
    ]
    sets = oracle.fewer(tokens).map(_search, jobs, "prune (naee)")
    return tuple(keep_set(layer, kept) for layer, kept in zip(shape.layers, sets, strict=True))


@dataclass(frozen=True)
class _SearchJob:
    layer: LayerShape
    count: int
    exhaustive: int


def _search(oracle: LayerOracle, job: _SearchJob) -> tuple[int, ...]:
    """Find the best set of one layer."""
    with oracle.visit(job.layer.layer) as view:
        return best_set(Reconstruction(view), job.layer, job.count, job.exhaustive)


def best_set(
    judge: Reconstruction, layer: LayerShape, count: int, exhaustive: int
) -> tuple[int, ...]:
    """Find the set of the smallest error, or a good one where there are too many.

    Args:
        judge: Judges sets.
        layer: The layer.
        count: Experts to keep, a multiple of the layer's router groups.
        exhaustive: Most sets that are all tried.

    Returns:
        Ids, ascending.
    """
    groups = [group.tolist() for group in router_groups(layer)]
    each = count // len(groups)
    if math.comb(len(groups[0]), each) ** len(groups) > exhaustive:
        return _exchange(judge, groups, _remove_one_by_one(judge, groups, each))
    choices = itertools.product(*(itertools.combinations(group, each) for group in groups))
    sets = (tuple(itertools.chain.from_iterable(choice)) for choice in choices)
    return min(sets, key=judge.error)


def _remove_one_by_one(
    judge: Reconstruction, groups: list[list[int]], each: int
) -> list[list[int]]:
    kept = [list(group) for group in groups]
    for _ in range(len(groups[0]) - each):
        # Groups stay equal, as the router needs them, so each gives one: chosen one after the
        # other, where there are several, with the others' choice as it is.
        gone = [group[0] for group in kept]
        for place, group in enumerate(kept):
            trials = [[*gone[:place], expert, *gone[place + 1 :]] for expert in group]
            gone = min(trials, key=lambda out: judge.error(_join(kept, out)))
        kept = [[expert for expert in group if expert not in gone] for group in kept]
    return kept


def _exchange(
    judge: Reconstruction, groups: list[list[int]], kept: list[list[int]]
) -> tuple[int, ...]:
    """Exchange a kept expert for a removed one while that lowers the error."""
    best = judge.error(_join(kept))
    improved = True
    while improved:
        improved = False
        for place, group in enumerate(groups):
            removed = [expert for expert in group if expert not in kept[place]]
            for old, new in itertools.product(list(kept[place]), removed):
                if old not in kept[place] or new in kept[place]:
                    continue
                other = sorted([*(e for e in kept[place] if e != old), new])
                trial = [*kept[:place], other, *kept[place + 1 :]]
                error = judge.error(_join(trial))
                # A difference of rounding must not decide, nor exchange for ever.
                if error < best * (1 - 1e-6):
                    kept, best, improved = trial, error, True
    return _join(kept)


def _join(kept: list[list[int]], gone: Sequence[int] = ()) -> tuple[int, ...]:
    return tuple(expert for group in kept for expert in group if expert not in gone)
