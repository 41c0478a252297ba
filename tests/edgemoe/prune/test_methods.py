"""Each method against its definition, computed anew from tokens; and the registry."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgemoe.calibrate.sample import TokenSample
from edgemoe.calibrate.statistics import Statistics
from edgemoe.calibrate.sums import LayerSums
from edgemoe.calibrate.task_statistics import Source, TaskStatistics
from edgemoe.errors import PlanError, StatisticsError
from edgemoe.models.shapes import LayerShape, ModelShape
from edgemoe.plans.plan import Plan
from edgemoe.prune.registry import METHODS, find_method, make_plan, read_options
from edgemoe.prune.uncurl import similarity

TOKENS = 60


def draw(seed: int, experts: int = 8, top_k: int = 2) -> dict[str, Any]:
    random = np.random.Generator(np.random.PCG64(seed))
    # A popularity per expert, so that counts differ and some experts may never be reached.
    logits = random.normal(size=(TOKENS, experts)) + random.normal(size=experts) * 2
    indices = np.argsort(-logits, axis=1)[:, :top_k]
    return {
        "logits": logits,
        "weights": random.random((TOKENS, top_k)) + 0.1,
        "indices": indices,
        "norms": random.random((TOKENS, top_k)) * 5,
    }


def make_statistics(
    layers: list[dict[str, Any]], experts: int = 8, top_k: int = 2, n_group: int = 1
) -> Statistics:
    return Statistics(
        checkpoint_sha256="c",
        shape=ModelShape(
            family="glm4_moe",
            layers=tuple(
                LayerShape(layer=index, num_experts=experts, top_k=top_k, n_group=n_group)
                for index in range(len(layers))
            ),
            hidden_size=8,
            intermediate_size=4,
        ),
        tasks={
            "t": TaskStatistics(
                sources=(
                    Source(
                        sha256="f",
                        lines=1,
                        tokens=TOKENS,
                        sequence_length=512,
                        sample=TokenSample.of([]),
                    ),
                ),
                layers={i: LayerSums.of_tokens(**tokens) for i, tokens in enumerate(layers)},
            )
        },
    )


def kept(plan: Plan) -> list[list[int]]:
    return [[e.members[0] for e in layer.experts] for layer in plan.layers]


def rank(scores: list[float], count: int) -> list[int]:
    order = sorted(range(len(scores)), key=lambda j: (-scores[j], j))
    return sorted(order[:count])


@given(seed=st.integers(0, 2**32), count=st.integers(2, 8))
def test_frequency_keeps_the_most_routed(seed: int, count: int) -> None:
    tokens = draw(seed)
    plan = make_plan(make_statistics([tokens]), "t", "frequency", [count])
    chosen = tokens["indices"].ravel().tolist()
    assert kept(plan) == [rank([chosen.count(j) for j in range(8)], count)]


@given(seed=st.integers(0, 2**32), count=st.integers(2, 8), factor=st.floats(0.1, 10))
def test_reap_keeps_the_highest_mean_gated_norm(seed: int, count: int, factor: float) -> None:
    tokens = draw(seed)
    scores = []
    for j in range(8):
        routed = [
            (t, s) for t in range(TOKENS) for s in range(2) if tokens["indices"][t, s] == j
        ]
        gated = [
            tokens["weights"][t, s] / tokens["weights"][t].sum() * tokens["norms"][t, s]
            for t, s in routed
        ]
        scores.append(float(np.mean(gated)) if gated else 0.0)
    expected = rank(scores, count)
    assert kept(make_plan(make_statistics([tokens]), "t", "reap", [count])) == [expected]
    # A routed scaling factor must not matter.
    tokens["weights"] = tokens["weights"] * factor
    assert kept(make_plan(make_statistics([tokens]), "t", "reap", [count])) == [expected]


def test_reap_prefers_a_loud_rare_expert_where_frequency_does_not() -> None:
    indices = np.array([[0, 1]] * 9 + [[2, 1]])
    norms = np.array([[1.0, 1.0]] * 9 + [[50.0, 1.0]])
    tokens = {
        "logits": np.zeros((10, 4)),
        "weights": np.ones((10, 2)),
        "indices": indices,
        "norms": norms,
    }
    statistics = make_statistics([tokens], experts=4)
    assert kept(make_plan(statistics, "t", "frequency", [2])) == [[0, 1]]
    assert kept(make_plan(statistics, "t", "reap", [2])) == [[0, 2]]


@settings(deadline=None)
@given(seed=st.integers(0, 2**32), count=st.integers(2, 8))
def test_uncurl_partitions_and_weighs_by_frequency(seed: int, count: int) -> None:
    tokens = draw(seed)
    plan = make_plan(make_statistics([tokens]), "t", "uncurl", [count])
    experts = plan.layers[0].experts
    assert len(experts) == count
    assert sorted(m for e in experts for m in e.members) == list(range(8))
    chosen = tokens["indices"].ravel().tolist()
    for expert in experts:
        if len(expert.members) == 1:
            continue
        counts = [chosen.count(member) for member in expert.members]
        assert expert.reference == expert.members[counts.index(max(counts))]
        assert expert.weights == (tuple(counts) if sum(counts) else None)


def test_uncurl_merges_experts_whose_logits_go_together() -> None:
    random = np.random.Generator(np.random.PCG64(0))
    causes = random.normal(size=(TOKENS, 3))
    groups = [0, 1, 0, 2, 1, 0, 2, 2]
    tokens = draw(0)
    tokens["logits"] = causes[:, groups] + 0.1 * random.normal(size=(TOKENS, 8))
    plan = make_plan(make_statistics([tokens]), "t", "uncurl", [3])
    assert [e.members for e in plan.layers[0].experts] == [(0, 2, 5), (1, 4), (3, 6, 7)]


@given(seed=st.integers(0, 2**32))
def test_similarity_is_the_shifted_cosine_over_tokens(seed: int) -> None:
    logits = draw(seed)["logits"]
    logits[:, 3] = 0
    found = similarity(logits.T @ logits)
    for i in range(8):
        for j in range(8):
            norm = np.linalg.norm(logits[:, i]) * np.linalg.norm(logits[:, j])
            cosine = logits[:, i] @ logits[:, j] / norm if norm else 0.0
            assert found[i, j] == pytest.approx((1 + cosine) / 2, abs=1e-12)


def test_random_depends_on_seed_and_layer_alone_and_nests() -> None:
    statistics = make_statistics([draw(0), draw(1), draw(2)])
    other = make_statistics([draw(3), draw(4), draw(5)])
    plans = [kept(make_plan(statistics, "t", "random", [4] * 3, seed=s)) for s in range(5)]
    assert kept(make_plan(other, "t", "random", [4] * 3, seed=0)) == plans[0]
    assert len({str(plan) for plan in plans}) == 5
    assert len({str(layer) for layer in plans[0]}) > 1
    more = kept(make_plan(statistics, "t", "random", [6] * 3, seed=0))
    assert all(set(few) < set(many) for few, many in zip(plans[0], more, strict=True))


def test_random_draws_every_expert_equally_often() -> None:
    statistics = make_statistics([draw(0)])
    drawn = [kept(make_plan(statistics, "t", "random", [2], seed=s))[0] for s in range(400)]
    counts = np.bincount(np.ravel(drawn), minlength=8)
    # 400 draws of 2 of 8: mean 100, standard deviation 8.7.
    assert np.abs(counts - 100).max() < 40


@pytest.mark.parametrize(
    "method", [name for name in METHODS if not METHODS[name].needs_forward]
)
def test_every_method_obeys_counts_and_is_pure(method: str, tmp_path: Path) -> None:
    statistics = make_statistics([draw(0), draw(1), draw(2)])
    plan = make_plan(statistics, "t", method, [8, 5, 2], seed=3)
    assert plan.experts_per_layer == (8, 5, 2)
    assert all(len(expert.members) == 1 for expert in plan.layers[0].experts)
    assert plan == make_plan(statistics, "t", method, [8, 5, 2], seed=3)
    statistics.save(tmp_path / "s")
    again = make_plan(Statistics.load(tmp_path / "s"), "t", method, (8, 5, 2), seed=3)
    assert again.sha256 == plan.sha256
    plan.save(tmp_path / "p")
    assert Plan.load(tmp_path / "p") == plan
    assert (plan.method, plan.task, plan.seed) == (method, "t", 3)
    assert plan.options == {"keep_experts": [8, 5, 2]}
    assert (plan.checkpoint_sha256, plan.statistics_sha256) == ("c", statistics.sha256)
    # Groups of the router keep as many each, and are never merged with one another.
    grouped = make_plan(make_statistics([draw(0)], n_group=2), "t", method, [4])
    sides = [{member // 4 for member in e.members} for e in grouped.layers[0].experts]
    assert sorted(map(list, sides)) == [[0], [0], [1], [1]]


def test_scores_are_those_of_the_papers() -> None:
    tokens = draw(4)
    statistics = make_statistics([tokens])
    scores = {"seer": np.zeros(8), "man": np.zeros(8), "msan": np.zeros(8)}
    counts = np.zeros(8)
    for weights, indices, norms in zip(
        tokens["weights"], tokens["indices"], tokens["norms"], strict=True
    ):
        for weight, expert, norm in zip(weights, indices, norms, strict=True):
            if expert < 8:
                counts[expert] += 1
                scores["seer"][expert] += weight / weights[indices < 8].sum()
                scores["man"][expert] += norm
                scores["msan"][expert] += norm**2
    for name in ("man", "msan"):
        scores[name] /= np.maximum(counts, 1)
    for name, values in scores.items():
        best = sorted(np.argsort(-values, kind="stable")[:5].tolist())
        assert kept(make_plan(statistics, "t", name, [5]))[0] == best


def test_unknown_methods_bad_counts_options_and_tasks_are_refused() -> None:
    with pytest.raises(PlanError, match=r"one of camera, frequency, heapr, .*got 'magic'"):
        find_method("magic")
    statistics = make_statistics([draw(0)])
    with pytest.raises(PlanError, match="top_k=2, got 1"):
        make_plan(statistics, "t", "reap", [1])
    with pytest.raises(PlanError, match="each of the 1 MoE layers"):
        make_plan(statistics, "t", "reap", [4, 4])
    with pytest.raises(PlanError, match="seed"):
        make_plan(statistics, "t", "random", [4], seed=-1)
    with pytest.raises(PlanError, match="must have the model to run its layers"):
        make_plan(statistics, "t", "naee", [4])
    with pytest.raises(PlanError, match=r"its own options, got \['population'\]"):
        make_plan(statistics, "t", "reap", [4], options={"population": 3})
    with pytest.raises(PlanError, match=r"NAME=VALUE, got 'size=3'.*population=100"):
        read_options("moe-i2", ["size=3"])
    with pytest.raises(PlanError, match="population of moe-i2 must be an integer"):
        read_options("moe-i2", ["population=many"])
    given = read_options("moe-i2", ["population=30", "ratios=given", "importance-tokens=64"])
    assert given == {"population": 30, "ratios": "given", "importance_tokens": 64}
    with pytest.raises(StatisticsError, match="'u'"):
        make_plan(statistics, "u", "reap", [4])
