"""How near to the best set of experts does each search come? The exhaustive optimum judges.

For some layers of the model every set of as many experts as are to stay is tried. The errors of
the sets that the genetic search (moe-i2), greedy removal, greedy removal with exchanges (naee
where there are too many to try), scores and chance choose are divided by the smallest. An
error is || F(X) - F_S(X) ||_F on the layer's output. Run it from the repository's root, with
the demo's model and statistics of `edgemoe calibrate`::

    python -m benchmarks.compression.layer_error demo/moe --stats stats.safetensors --task code

Markdown goes to stdout.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np
import torch

from benchmarks.tables import write_table
from edgemoe.calibrate.mixture import mix
from edgemoe.calibrate.statistics import Statistics
from edgemoe.layerwise.provider import open_layers
from edgemoe.oracle.oracle import LayerOracle
from edgemoe.oracle.reconstruction import Reconstruction
from edgemoe.prune.moe_i2 import GeneticSearch
from edgemoe.prune.naee import best_set
from edgemoe.prune.registry import make_plan

if TYPE_CHECKING:
    from edgemoe.models.shapes import LayerShape

_SEEDS = 5
_DRAWN = 100
_POPULATION, _GENERATIONS = 100, 50
_SCORES = ("reap", "msan", "frequency")


@dataclass
class Runs:
    """What one way of choosing came to, run by run."""

    ratios: list[float] = field(default_factory=list)
    judged: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def search_all(judge: Reconstruction, layer: LayerShape, count: int, seed: int) -> list[int]:
    """Try every set."""
    del seed
    return list(best_set(judge, layer, count, 10**9))


def search_genes(judge: Reconstruction, layer: LayerShape, count: int, seed: int) -> list[int]:
    """Search as moe-i2 does, with the paper's population and generations."""
    random = np.random.Generator(np.random.PCG64([seed, layer.layer]))
    return list(GeneticSearch(judge, layer, count, random).run(_POPULATION, _GENERATIONS)[0])


def remove_greedily(
    judge: Reconstruction, layer: LayerShape, count: int, seed: int
) -> list[int]:
    """Remove one expert after the other, each time the one that costs least."""
    del seed
    kept = list(range(layer.num_experts))
    while len(kept) > count:
        trials = [[other for other in kept if other != expert] for expert in kept]
        kept = min(trials, key=judge.error)
    return kept


def exchange(judge: Reconstruction, layer: LayerShape, count: int, seed: int) -> list[int]:
    """Remove greedily, then exchange kept experts for removed ones while that helps."""
    del seed
    return list(best_set(judge, layer, count, 0))


def draw(judge: Reconstruction, layer: LayerShape, count: int, seed: int) -> list[int]:
    """Choose by chance."""
    del judge
    random = np.random.Generator(np.random.PCG64([seed, layer.layer]))
    return sorted(random.choice(layer.num_experts, count, replace=False).tolist())


_WAYS = {
    "exhaustive (naee)": (search_all, 1),
    "genetic search (moe-i2)": (search_genes, _SEEDS),
    "greedy": (remove_greedily, 1),
    "greedy, then exchanges": (exchange, 1),
    "random": (draw, _DRAWN),
}


@click.command()
@click.argument("model", type=click.Path(path_type=Path, exists=True))
@click.option("--stats", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--task", required=True)
@click.option("--keep-experts", default=8, show_default=True)
@click.option("--every", default=4, show_default=True, help="Every how manieth layer.")
@click.option("--tokens", default=1024, show_default=True)
@click.option("--threads", default=1, show_default=True)
def main(
    model: Path,
    stats: Path,
    task: str,
    keep_experts: int,
    every: int,
    tokens: int,
    threads: int,
) -> None:
    """Compare searches on layers of MODEL."""
    torch.set_num_threads(threads)
    statistics = Statistics.load(stats)
    counts = [keep_experts] * len(statistics.shape.layers)
    plans = {name: make_plan(statistics, task, name, counts) for name in _SCORES}
    oracle = LayerOracle(open_layers(model), mix(statistics, {task: 1.0}).windows)
    found: dict[str, Runs] = defaultdict(Runs)
    views = oracle.fewer(tokens).walk("search")
    for number, (layer, view) in enumerate(zip(statistics.shape.layers, views, strict=True)):
        if number % every:
            continue
        best, judge = math.inf, Reconstruction(view)
        for name, (way, runs) in _WAYS.items():
            for seed in range(runs):
                judge.forget()
                began = time.process_time()
                error = judge.error(way(judge, layer, keep_experts, seed))
                found[name].seconds.append(time.process_time() - began)
                found[name].judged.append(judge.evaluated)
                best = min(best, error)
                found[name].ratios.append(math.sqrt(error / best))
        for name, plan in plans.items():
            kept = sorted(expert.members[0] for expert in plan.layers[number].experts)
            found[name].ratios.append(math.sqrt(judge.error(kept) / best))
    rows = [
        [
            name,
            f"{np.mean(runs.ratios):.4f}",
            f"{max(runs.ratios):.4f}",
            f"{np.mean(np.array(runs.ratios) < 1 + 1e-6):.0%}",
            f"{np.mean(runs.judged):.0f}" if runs.judged else "",
            f"{np.mean(runs.seconds):.2f}" if runs.seconds else "",
        ]
        for name, runs in found.items()
    ]
    heading = ["chosen by", "error / smallest, mean", "largest", "runs that find it"]
    write_table([*heading, "sets judged", "processor seconds per layer"], rows)


if __name__ == "__main__":
    main()
