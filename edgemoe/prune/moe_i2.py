"""moe-i2: the inter-expert part of MoE-I² (Yang et al., 2024).

https://arxiv.org/abs/2411.01016, in three steps:

1. Expert importance I_ij, the rise of the loss without expert j of layer i, and layer
   importance I_i = sum_j I_ij (`edgemoe.oracle.ablation`). Important layers lose fewer
   experts: the number that layer i loses is proportional to 1 / I_i, within what its router
   needs. The paper does not print the map; here whole experts are shared out by highest
   averages (D'Hondt) over 1 / (I_i + mean(I) / 100), while a layer has an expert to spare.
2. Layer-wise Genetic Search: an individual is the set of experts that a layer loses, its
   fitness -||F(X) - F_S(X)||_F on the layer's output. The fittest fifth are parents; a child is
   drawn from the union of two parents' sets, and with probability 0.3 an expert of it is
   exchanged (neither rate is in the paper). 100 individuals, 50 generations.
3. Block-wise KT-Reception Field: of the K best sets of each of T consecutive layers, the
   combination whose block, run as the model runs it, moves least
   (`edgemoe.oracle.blocks`). K = T = 3.

Its second stage, low-rank factors, is `edgemoe decompose`; its third, LoRA, is
`edgemoe recover`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgemoe.errors import PlanError
from edgemoe.oracle.ablation import loss_increases
from edgemoe.oracle.blocks import choose_in_blocks
from edgemoe.oracle.reconstruction import Reconstruction
from edgemoe.prune.selection import keep_set, router_groups

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from edgemoe.calibrate.task_statistics import TaskStatistics
    from edgemoe.models.shapes import LayerShape, ModelShape
    from edgemoe.oracle.oracle import LayerOracle
    from edgemoe.plans.plan import LayerPlan

_PARENTS = 0.2
_MUTATION = 0.3
# Smallest importance of a layer, as a share of the layers' mean: none loses everything.
_FLOOR = 0.01

_Set = tuple[int, ...]


def moe_i2(
    oracle: LayerOracle,
    statistics: TaskStatistics,
    shape: ModelShape,
    counts: Sequence[int],
    seed: int,
    *,
    ratios: str = "importance",
    tokens: int = 1024,
    importance_tokens: int = 512,
    population: int = 100,
    generations: int = 50,
    candidates: int = 3,
    block: int = 3,
) -> tuple[LayerPlan, ...]:
    """Keep what importance, genetic search and the reception field leave.

    Args:
        oracle: The model and the task's tokens.
        statistics: Not used.
        shape: The model.
        counts: Experts to keep per MoE layer; their sum counts unless `ratios` is `given`.
        seed: Seed of the search, in [0, inf).
        ratios: `importance`: layers lose experts by their importance; `given`: each keeps
            its count.
        tokens: Tokens that sets are judged on, in [1, inf).
        importance_tokens: Tokens that the loss is measured on, in [2, inf).
        population: Individuals, in [2, inf).
        generations: Generations after the first, in [0, inf).
        candidates: K: sets per layer that blocks choose from, in [1, inf); 1 leaves blocks out.
        block: T: MoE layers in a block, in [1, inf).

    Returns:
        One plan per MoE layer.

    Raises:
        PlanError: `ratios` is none of the two.
        StreamingError: The model is larger than memory and importance is asked for.
    """
    if ratios not in ("importance", "given"):
        raise PlanError(f"ratios must be importance or given, got {ratios!r}.")
    if ratios == "importance":
        increases = oracle.once(
            ("loss increases", importance_tokens),
            lambda: loss_increases(oracle.fewer(importance_tokens)),
        )
        importance = [float(layer.sum()) for layer in increases]
        counts = share_out(shape.layers, importance, sum(counts))
    sample = oracle.fewer(tokens)
    jobs = [
        _SearchJob(layer, count, seed, population, generations, candidates)
        for layer, count in zip(shape.layers, counts, strict=True)
    ]
    sets = sample.map(_search, jobs, "search sets of experts")
    found = {layer.layer: best for layer, best in zip(shape.layers, sets, strict=True)}
    chosen = (
        {index: best[0] for index, best in found.items()}
        if candidates == 1
        else choose_in_blocks(sample, found, block)
    )
    return tuple(keep_set(layer, chosen[layer.layer]) for layer in shape.layers)


@dataclass(frozen=True)
class _SearchJob:
    layer: LayerShape
    count: int
    seed: int
    population: int
    generations: int
    candidates: int


def _search(oracle: LayerOracle, job: _SearchJob) -> list[_Set]:
    """Search the best sets of one layer."""
    random = np.random.Generator(np.random.PCG64([job.seed, job.layer.layer]))
    with oracle.visit(job.layer.layer) as view:
        search = GeneticSearch(Reconstruction(view), job.layer, job.count, random)
        return search.run(job.population, job.generations)[: job.candidates]


def share_out(
    layers: Sequence[LayerShape], importance: Sequence[float], kept: int
) -> tuple[int, ...]:
    """Distribute lost experts over layers in inverse proportion to their importance.

    Args:
        layers: The layers.
        importance: I_i of each, in [0, inf).
        kept: Experts that remain in all layers together.

    Returns:
        Experts that each layer keeps: a multiple of its router groups, no fewer than its router
        needs; as near to `kept` together as groups allow.
    """
    values = np.asarray(importance, np.float64)
    # Only ratios count: scaled first, so that no sum or inverse overflows.
    values = values / values.max() if values.max() > 0 else np.ones(len(values))
    weights = 1 / (values + _FLOOR * values.mean())
    # In steps of one expert per router group.
    room = [(layer.num_experts - layer.least_kept) // layer.n_group for layer in layers]
    lost = [0] * len(layers)
    to_lose = sum(layer.num_experts for layer in layers) - kept
    while to_lose > 0:
        open_ = [i for i in range(len(layers)) if lost[i] < room[i]]
        open_ = [i for i in open_ if layers[i].n_group <= to_lose]
        if not open_:
            break
        # Highest averages: the layer that is furthest behind its share is next.
        nearest = min(open_, key=lambda i: ((lost[i] + 1) * layers[i].n_group / weights[i], i))
        lost[nearest] += 1
        to_lose -= layers[nearest].n_group
    return tuple(
        layer.num_experts - steps * layer.n_group
        for layer, steps in zip(layers, lost, strict=True)
    )


class GeneticSearch:
    """Evolve the sets of experts that one layer keeps."""

    def __init__(
        self,
        judge: Reconstruction,
        layer: LayerShape,
        count: int,
        random: np.random.Generator,
    ) -> None:
        """Prepare a search.

        Args:
            judge: Judges sets.
            layer: The layer.
            count: Experts to keep, a multiple of the layer's router groups.
            random: Draws everything.
        """
        self._judge = judge
        self._groups = router_groups(layer)
        self._lost = (layer.num_experts - count) // layer.n_group
        self._random = random
        self._all = frozenset(range(layer.num_experts))

    def run(self, population: int, generations: int) -> list[_Set]:
        """Search.

        Args:
            population: Individuals, in [2, inf).
            generations: Generations after the first, in [0, inf).

        Returns:
            The different sets of the last generation, kept ids ascending, best first.
        """
        if self._lost == 0:
            return [tuple(sorted(self._all))]
        individuals = [self._draw() for _ in range(population)]
        for _ in range(generations):
            individuals = self._rank(individuals)
            parents = individuals[: max(2, int(population * _PARENTS))]
            # The same sets over and over are no search: what is missing is drawn anew.
            while len(parents) < 2:
                parents.append(self._draw())
            children = [self._breed(parents) for _ in range(population - len(parents))]
            individuals = parents + children
        return [self._kept(lost) for lost in self._rank(individuals)]

    def _rank(self, individuals: list[frozenset[int]]) -> list[frozenset[int]]:
        different = list(dict.fromkeys(individuals))
        return sorted(different, key=lambda lost: self._judge.error(self._kept(lost)))

    def _kept(self, lost: frozenset[int]) -> _Set:
        return tuple(sorted(self._all - lost))

    def _draw(self) -> frozenset[int]:
        return frozenset(
            int(expert)
            for group in self._groups
            for expert in self._random.choice(group, self._lost, replace=False)
        )

    def _breed(self, parents: list[frozenset[int]]) -> frozenset[int]:
        first, second = self._random.choice(len(parents), 2, replace=False)
        union = parents[first] | parents[second]
        child = {
            int(expert)
            for group in self._groups
            for expert in self._random.choice(
                [e for e in group.tolist() if e in union], self._lost, replace=False
            )
        }
        if self._random.random() < _MUTATION:
            self._mutate(child)
        return frozenset(child)

    def _mutate(self, lost: set[int]) -> None:
        group: NDArray[np.int64] = self._groups[self._random.integers(len(self._groups))]
        inside = [expert for expert in group.tolist() if expert in lost]
        outside = [expert for expert in group.tolist() if expert not in lost]
        if outside:
            lost.remove(inside[self._random.integers(len(inside))])
            lost.add(outside[self._random.integers(len(outside))])
