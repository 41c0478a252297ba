from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edgemoe.apply.expert_tensors import plan_tensors
from edgemoe.calibrate.collect import collect
from edgemoe.errors import PlanError
from edgemoe.layerwise.provider import InMemoryLayers
from edgemoe.models import adapt_model, load_tokenizer
from edgemoe.models.shapes import LayerShape
from edgemoe.models.tiny import tiny_config, tiny_model, write_tiny_checkpoint
from edgemoe.oracle.oracle import LayerOracle
from edgemoe.oracle.reconstruction import Reconstruction
from edgemoe.prune.moe_i2 import GeneticSearch, share_out
from edgemoe.prune.naee import best_set
from edgemoe.prune.registry import make_plan
from edgemoe.tasks import TaskFile

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from edgemoe.calibrate.statistics import Statistics
    from edgemoe.plans.plan import Plan

QUICK = {"population": 12, "generations": 5}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Statistics, LayerOracle]:
    """A tiny model, what it does on a task, and an oracle over the same tokens."""
    path: Path = tmp_path_factory.mktemp("searching")
    checkpoint = write_tiny_checkpoint("qwen2_moe", path / "model")
    model = adapt_model(tiny_model(tiny_config("qwen2_moe")), checkpoint)
    random = np.random.Generator(np.random.PCG64(0))
    lines = [" ".join(f"w{i}" for i in random.integers(3, 96, 30)) for _ in range(5)]
    file = path / "task.jsonl"
    file.write_text("".join(f'{{"text": "{line}"}}\n' for line in lines))
    task = TaskFile.load("t", file)
    statistics = collect(model, [task], load_tokenizer(checkpoint))
    return statistics, LayerOracle(InMemoryLayers(model), statistics.task("t").windows)


def plan_with(
    measured: tuple[Statistics, LayerOracle], method: str, count: int, **options: Any
) -> Plan:
    statistics, oracle = measured

    def reopen(windows: Sequence[Any]) -> LayerOracle:
        assert sum(len(window.ids) for window in windows) == 150
        return LayerOracle(oracle.provider, windows)

    layers = len(statistics.shape.layers)
    return make_plan(
        statistics, "t", method, [count] * layers, options=options, open_oracle=reopen
    )


def kept(plan: Plan) -> list[tuple[int, ...]]:
    return [tuple(e.members[0] for e in layer.experts) for layer in plan.layers]


def test_naee_finds_the_set_of_the_least_error(
    measured: tuple[Statistics, LayerOracle],
) -> None:
    found = kept(plan_with(measured, "naee", 5))
    for view, chosen in zip(measured[1].walk("test"), found, strict=True):
        judge = Reconstruction(view)
        errors = {s: judge.error(s) for s in itertools.combinations(range(8), 5)}
        assert chosen == min(errors, key=errors.__getitem__)


def test_naee_beyond_exhaustion_ends_where_no_exchange_helps(
    measured: tuple[Statistics, LayerOracle],
) -> None:
    for view, layer in zip(measured[1].walk("test"), measured[0].shape.layers, strict=True):
        judge = Reconstruction(view)
        chosen = best_set(judge, layer, 5, exhaustive=0)
        assert judge.evaluated < 56
        error = judge.error(chosen)
        for old, new in itertools.product(chosen, set(range(8)) - set(chosen)):
            other = tuple(sorted({*chosen, new} - {old}))
            assert judge.error(other) >= error * (1 - 1e-5)


@dataclass
class Additive:
    """A judge whose best sets are known: errors are sums of the lost experts' costs."""

    costs: list[float]
    calls: list[tuple[int, ...]] = field(default_factory=list)

    def error(self, kept: tuple[int, ...]) -> float:
        self.calls.append(kept)
        return sum(cost for expert, cost in enumerate(self.costs) if expert not in kept)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([1, 2, 4]), st.data())
def test_genetic_search_obeys_groups_and_finds_the_best(
    seed: int, groups: int, data: st.DataObject
) -> None:
    each = data.draw(st.integers(2 // groups + 1, 16 // groups))
    random = np.random.Generator(np.random.PCG64(seed))
    layer = LayerShape(layer=0, num_experts=16, top_k=2, n_group=groups)
    judge: Any = Additive(random.random(16).tolist())
    found = GeneticSearch(judge, layer, each * groups, random).run(100, 50)
    for ids in judge.calls:
        assert list(ids) == sorted(set(ids))
        counts = np.bincount(np.array(ids) // (16 // groups), minlength=groups)
        assert counts.tolist() == [each] * groups
    costs = np.array(judge.costs).reshape(groups, -1)
    best = np.sort(costs, axis=1)[:, : 16 // groups - each].sum()
    assert judge.error(found[0]) == pytest.approx(best)
    errors = [judge.error(ids) for ids in found]
    assert errors == sorted(errors)
    assert len(set(found)) == len(found)


def test_moe_i2_is_near_the_optimum_and_depends_on_its_seed_alone(
    measured: tuple[Statistics, LayerOracle],
) -> None:
    options = {"ratios": "given", "candidates": 1, **QUICK}
    plan = plan_with(measured, "moe-i2", 5, **options)
    assert plan == plan_with(measured, "moe-i2", 5, **options)
    assert plan.options["population"] == 12
    assert plan.options["block"] == 3
    for view, chosen in zip(measured[1].walk("test"), kept(plan), strict=True):
        judge = Reconstruction(view)
        errors = sorted(judge.error(s) for s in itertools.combinations(range(8), 5))
        # Of 56 sets, 60 draws and their children find one of the best.
        assert judge.error(chosen) <= errors[2]


def test_moe_i2_spends_the_whole_budget_by_importance(
    measured: tuple[Statistics, LayerOracle],
) -> None:
    plan = plan_with(measured, "moe-i2", 5, importance_tokens=60, **QUICK)
    assert sum(plan.experts_per_layer) == 5 * len(plan.layers)
    assert len(set(plan.experts_per_layer)) > 1
    with pytest.raises(PlanError, match="ratios must be importance or given, got 'equal'"):
        plan_with(measured, "moe-i2", 5, ratios="equal")


@example([5e-324, 0.0], (16, 2, 1), 0.0)
@example([0.0, 0.0, 0.0], (16, 4, 4), 0.5)
@given(
    st.lists(st.floats(0, 1e3), min_size=1, max_size=8),
    st.sampled_from([(16, 2, 1), (16, 4, 4), (9, 3, 3)]),
    st.floats(0, 1),
)
def test_important_layers_lose_no_more(
    importance: list[float], sizes: tuple[int, int, int], share: float
) -> None:
    experts, top_k, groups = sizes
    layers = [
        LayerShape(layer=i, num_experts=experts, top_k=top_k, n_group=groups)
        for i in range(len(importance))
    ]
    least = -(-layers[0].min_experts // groups) * groups
    asked = round((least + share * (experts - least)) * len(layers) / groups) * groups
    found = share_out(layers, importance, asked)
    assert sum(found) == asked
    assert all(least <= count <= experts and count % groups == 0 for count in found)
    for one, two in itertools.permutations(range(len(layers)), 2):
        if importance[one] > importance[two]:
            assert found[one] >= found[two] - groups


def test_ream_merges_into_the_best_and_goes_on_from_what_it_merged(
    measured: tuple[Statistics, LayerOracle],
) -> None:
    statistics, oracle = measured
    plan = plan_with(measured, "ream", 6)
    scores = [
        sums.gate_norm / np.maximum(sums.count, 1)
        for sums in statistics.task("t").layers.values()
    ]
    first = plan.layers[0]
    assert sorted(m for e in first.experts for m in e.members) == list(range(8))
    best = set(np.argsort(-scores[0])[:6].tolist())
    assert {e.aligned_to for e in first.experts} == best
    for expert in first.experts:
        if len(expert.members) > 1:
            assert expert.weights == pytest.approx([scores[0][m] for m in expert.members])
    # The second layer's plan is that of a model whose first layer was merged.
    layer = oracle.moe.layers[0]
    with layer.changed(plan_tensors(layer, first)):
        views = oracle.walk("test")
        next(views)
        second = next(views)
        norms: dict[int, list[float]] = {expert: [] for expert in range(8)}
        for token, (ids, gates) in enumerate(
            zip(second.routing.indices.tolist(), second.routing.weights.tolist(), strict=True)
        ):
            for expert, gate in zip(ids, gates, strict=True):
                output = second.layer.expert_output(expert, second.hidden[token : token + 1])
                norms[expert].append(gate / sum(gates) * float(output.double().norm()))
    merged_scores = np.array([np.mean(norms[e]) if norms[e] else 0.0 for e in range(8)])
    assert {e.aligned_to for e in plan.layers[1].experts} == set(
        np.argsort(-merged_scores)[:6].tolist()
    )
    weights = {
        member: weight
        for e in plan.layers[1].experts
        for member, weight in zip(e.members, e.weights or (), strict=False)
    }
    assert weights
    for member, weight in weights.items():
        assert weight == pytest.approx(merged_scores[member], rel=1e-4)
