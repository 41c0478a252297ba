"""From statistics and a plan to ranks, and what they cost when they are carried out."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from edgemoe.apply.expert_tensors import planned_tensors
from edgemoe.apply.in_memory import apply_plan
from edgemoe.calibrate.collect import collect
from edgemoe.calibrate.mixture import spread_windows
from edgemoe.calibrate.saliency import mean_gated_norm
from edgemoe.decompose.decision import RankedPlan, add_ranks, method_options, read_options
from edgemoe.decompose.ranks import spread
from edgemoe.errors import PlanError, StatisticsError
from edgemoe.layerwise.provider import InMemoryLayers
from edgemoe.models import load_model, load_tokenizer
from edgemoe.models.factored_experts import FACTOR_NAMES
from edgemoe.models.tiny import write_tiny_checkpoint
from edgemoe.oracle.ablation import loss_increases
from edgemoe.oracle.oracle import LayerOracle
from edgemoe.plans.keep_all import keep_all
from edgemoe.plans.plan import LayerPlan, MergedExpert, Plan
from edgemoe.tasks import TaskFile

if TYPE_CHECKING:
    from pathlib import Path

    from edgemoe.calibrate.statistics import Statistics
    from edgemoe.models import MoeModel

MERGED = MergedExpert(members=(2, 3), weights=(3.0, 1.0))


@pytest.fixture(scope="module", params=["mixtral", "gpt_oss"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    write_tiny_checkpoint(request.param, folder / "moe")
    rows = [" ".join(f"w{(7 * line + 5 * n * n) % 96}" for n in range(40)) for line in range(5)]
    text = "".join(json.dumps({"text": row}) + "\n" for row in rows)
    (folder / "task.jsonl").write_text(text)
    return folder


@pytest.fixture(scope="module")
def statistics(path: Path) -> Statistics:
    task = TaskFile.load("t", path / "task.jsonl")
    return collect(load_model(path / "moe"), [task], load_tokenizer(path / "moe"))


def pruned(model: MoeModel) -> Plan:
    """All of the first layer, six of the others, two of them merged."""
    plan = keep_all(model.shape)
    experts = (*plan.layers[0].experts[:2], MERGED, *plan.layers[0].experts[4:7])
    others = tuple(LayerPlan(layer=layer.layer, experts=experts) for layer in plan.layers[1:])
    return replace(plan, layers=(plan.layers[0], *others))


def decide(
    model: MoeModel,
    statistics: Statistics,
    method: str = "svd",
    ratio: float = 0.6,
    plan: Plan | None = None,
    **options: Any,
) -> RankedPlan:
    return add_ranks(
        plan or keep_all(model.shape),
        model.layers,
        statistics,
        "t",
        method,
        ratio,
        open_layers=lambda: InMemoryLayers(model),
        prepare=planned_tensors,
        options=options,
    )


def routed_parameters(model: MoeModel) -> int:
    found = 0
    for layer in model.layers:
        names = FACTOR_NAMES if layer.is_factored else layer.layout.names[:2]
        names = (*names, *layer.layout.names[2:])
        found += sum(layer.tensor(f"{layer.spec.experts}.{name}").numel() for name in names)
    return found


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("svd", {}),
        ("svd", {"importance": "reap", "multiple": 1}),
        ("svd", {"importance": "frequency", "layers": "loss"}),
        ("svd-whitened", {"layers": "loss", "multiple": 1, "tokens": 90}),
    ],
)
@pytest.mark.parametrize("ratio", [0.35, 0.75])
def test_the_ratio_is_what_is_stored(
    path: Path, statistics: Statistics, method: str, options: dict[str, Any], ratio: float
) -> None:
    model = load_model(path / "moe")

    found = decide(model, statistics, method, ratio, pruned(model), **options)

    whole = routed_parameters(apply_plan(load_model(path / "moe"), pruned(model)))
    small = apply_plan(load_model(path / "moe"), found.plan)
    assert found.parameters_before == whole
    assert found.parameters_after == routed_parameters(small)
    assert 0.97 * ratio < found.ratio <= ratio
    assert small.experts_per_layer == (8, 6, 6, 6)
    assert found.plan.checkpoint_sha256 == statistics.checkpoint_sha256
    assert Plan.from_json(found.plan.to_json()) == found.plan


def test_layers_that_lose_more_keep_more(path: Path, statistics: Statistics) -> None:
    model = load_model(path / "moe")
    for layer in model.layers[:1]:
        # Scaled up, the first layer loses a thousand times as much.
        layer.replace({name: 1000 * tensor for name, tensor in layer.tensors().items()})

    equal = decide(model, statistics, multiple=1).plan.ranks_per_layer
    found = decide(model, statistics, multiple=1, layers="loss").plan.ranks_per_layer

    assert len(set(equal)) <= 2
    first, others = found[0], found[1:]
    assert first is not None
    assert equal[0] is not None
    for part in range(2):
        assert first[part] > equal[0][part]
        assert all(pair is not None and pair[part] < first[part] for pair in others)


def test_importance_is_that_of_the_experts_members(path: Path, statistics: Statistics) -> None:
    model = load_model(path / "moe")
    plan, layers = pruned(model), statistics.tasks["t"].layers
    windows = spread_windows(statistics.tasks["t"].windows, 512)
    losses = loss_increases(LayerOracle(InMemoryLayers(model), windows))
    scores = {
        "frequency": [layer.count for layer in layers.values()],
        "reap": [mean_gated_norm(layer) for layer in layers.values()],
        "loss": losses,
    }
    for choice, found in scores.items():
        ranked = decide(model, statistics, plan=plan, importance=choice, multiple=1).plan
        for layer, values in zip(ranked.layers, found, strict=True):
            assert layer.ranks is not None
            assert layer.stored_ranks is not None
            sums = [sum(values[member] for member in e.members) for e in layer.experts]
            for part, largest in enumerate(layer.stored_ranks):
                assert tuple(pair[part] for pair in layer.ranks) == spread(largest, sums)
    assert len(set(ranked.layers[1].ranks or ())) > 1


def test_the_plan_holds_the_tokens_that_the_method_looks_at(
    path: Path, statistics: Statistics
) -> None:
    model = load_model(path / "moe")

    found = decide(model, statistics, "svd-whitened", tokens=60, prior_tokens=3).plan

    assert found.factors is not None
    assert found.factors.sample is not None
    windows = spread_windows(statistics.tasks["t"].windows, 60)
    assert [w.ids for w in found.factors.sample.to_windows()] == [w.ids for w in windows]
    assert found.factors.options == {
        "param_ratio": 0.6,
        "importance": "uniform",
        "layers": "equal",
        "multiple": 8,
        "tokens": 60,
        "prior_tokens": 3,
    }
    plain = decide(model, statistics, "svd").plan.factors
    assert plain is not None
    assert plain.sample is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "svdd"}, "must be one of shared-basis, svd, svd-whitened, got 'svdd'"),
        ({"ratio": 1.5}, "factors are larger than the matrices"),
        ({"ratio": 0.001}, "because rank 1 takes that much"),
        ({"importance": "luck"}, "importance must be one of uniform, frequency, reap, loss"),
        ({"layers": "luck"}, "layers must be equal or loss, got 'luck'"),
        ({"multiple": 0}, "multiple must be"),
        ({"tokens": 5}, "its own options, got"),
        ({"method": "svd-whitened", "tokens": 0}, "tokens must be"),
    ],
)
def test_what_cannot_be_is_refused(
    path: Path, statistics: Statistics, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        decide(load_model(path / "moe"), statistics, **changes)


def test_what_is_factored_is_not_factored_again(path: Path, statistics: Statistics) -> None:
    model = load_model(path / "moe")
    plan = decide(model, statistics).plan
    with pytest.raises(
        PlanError, match="must have no ranks to be given some, got those of svd"
    ):
        decide(model, statistics, plan=plan)
    apply_plan(model, plan)
    with pytest.raises(PlanError, match="must be whole to be factored"):
        decide(model, statistics)
    with pytest.raises(PlanError, match="must have whole experts to be factored"):
        apply_plan(model, replace(plan, checkpoint_sha256=None))


def test_tasks_that_were_not_measured_are_refused(path: Path, statistics: Statistics) -> None:
    with pytest.raises(StatisticsError, match="must be one of"):
        add_ranks(
            keep_all(statistics.shape),
            load_model(path / "moe").layers,
            statistics,
            "other",
            "svd",
            0.5,
            open_layers=lambda: pytest.fail("the model is not needed"),
            prepare=planned_tensors,
        )


def test_options_are_read_by_name_and_type() -> None:
    assert read_options("svd-whitened", ["prior-tokens=9", "layers=loss"]) == {
        "prior_tokens": 9,
        "layers": "loss",
    }
    assert "tokens" not in method_options("svd")
    with pytest.raises(PlanError, match="Options with their defaults: importance=uniform"):
        read_options("svd", ["tokens=9"])
    with pytest.raises(PlanError, match="option multiple of svd must be an integer"):
        read_options("svd", ["multiple=x"])
