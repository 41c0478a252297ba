"""Which cuts there are, and when two decide the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from edgemoe.calibrate.collect import collect
from edgemoe.errors import PlanError, SweepError
from edgemoe.models.checkpoint import load_model, load_tokenizer
from edgemoe.models.shapes import LayerShape, ModelShape
from edgemoe.plans.keep_all import keep_all
from edgemoe.prune.registry import METHODS, make_plan
from edgemoe.sweep.candidates import hash_decision, list_candidates
from edgemoe.sweep.methods import method_of, read_methods
from edgemoe.sweep.request import SweepRequest
from edgemoe.tasks import TaskFile

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

WIDE = ModelShape(
    family="x",
    layers=tuple(LayerShape(layer=index, num_experts=8, top_k=3) for index in range(2)),
    hidden_size=64,
    intermediate_size=64,
)
SHAPE = ModelShape(
    family="mixtral",
    layers=tuple(LayerShape(layer=index, num_experts=8, top_k=3) for index in range(2)),
    hidden_size=32,
    intermediate_size=16,
)


def request_of(path: Path, **changes: Any) -> SweepRequest:
    given: dict[str, Any] = {
        "model": path / "moe",
        "output": path / "report",
        "tasks": {"one": path / "one.jsonl", "two": path / "two.jsonl"},
        "methods": read_methods(["reap,random"], []),
    }
    return SweepRequest(**{**given, **changes})


def test_only_methods_that_draw_have_several_seeds(tmp_path: Path) -> None:
    request = request_of(tmp_path, keeps=(0.5, 1.0, 0.25, 0.1), seeds=(4, 7))
    candidates, impossible = list_candidates(request, SHAPE)
    assert [candidate.name for candidate in candidates if candidate.task == "one"] == [
        "one-reap-1-0",
        "one-reap-0.5-0",
        "one-random-1-4",
        "one-random-1-7",
        "one-random-0.5-4",
        "one-random-0.5-7",
    ]
    assert [candidate.name.replace("two", "one") for candidate in candidates[6:]] == [
        candidate.name for candidate in candidates[:6]
    ]
    assert [found.keep for found in impossible] == [0.25, 0.1]
    assert "each token uses top_k=3, got 2" in impossible[0].reason
    with pytest.raises(SweepError, match=r"got none in 0.2: layer 0 must keep at least 3"):
        list_candidates(request_of(tmp_path, keeps=(0.2,)), SHAPE)


def test_methods_that_choose_neurons_cut_below_what_a_router_needs(tmp_path: Path) -> None:
    methods = read_methods(["reap,camera"], [])
    request = request_of(tmp_path, methods=methods, keeps=(0.5, 0.25, 0.1))
    candidates, impossible = list_candidates(request, WIDE)
    found = {(candidate.method, candidate.keep): candidate.counts for candidate in candidates}
    assert found == {
        ("reap", 0.5): (4, 4),
        ("camera", 0.5): (32, 32),
        ("camera", 0.25): (16, 16),
    }
    reasons = [(one.keep, one.reason.split(",")[0]) for one in impossible]
    assert [keep for keep, _ in reasons] == [0.25, 0.1, 0.1]
    assert reasons[2][1].startswith("--keep must leave 8 neurons in every expert")


def test_options_make_another_cut_and_are_the_methods_own(tmp_path: Path) -> None:
    methods = read_methods(["moe-i2", "reap"], ["moe-i2:population=12"])
    assert methods == {"moe-i2": {"population": 12}, "reap": {}}
    candidates, _ = list_candidates(request_of(tmp_path, methods=methods), SHAPE)
    others, _ = list_candidates(
        request_of(tmp_path, methods=read_methods(["moe-i2,reap"], [])), SHAPE
    )
    pairs = list(zip(candidates, others, strict=True))
    assert all(one.name == other.name for one, other in pairs)
    assert all((one.key != other.key) == (one.method == "moe-i2") for one, other in pairs)
    with pytest.raises(PlanError, match="must be one of camera, frequency"):
        read_methods(["best"], [])
    with pytest.raises(PlanError, match="an option of reap must be NAME=VALUE"):
        read_methods(["reap"], ["reap:population=3"])
    with pytest.raises(
        SweepError, match=r"METHOD:NAME=VALUE with a method of this sweep \(reap"
    ):
        read_methods(["reap"], ["moe-i2:population=3"])
    with pytest.raises(SweepError, match="each method once, got reap, reap"):
        read_methods(["reap", "reap"], [])


def test_layers_in_both_ways_sweep_a_method_twice(tmp_path: Path) -> None:
    texts = ["reap:owl-range=0.2", "moe-i2:population=12"]
    methods = read_methods(["reap,moe-i2"], texts, ["uniform", "owl"])
    assert methods == {
        "reap": {},
        "reap+owl": {"layers": "owl", "owl_range": 0.2},
        "moe-i2": {"population": 12},
    }
    candidates, _ = list_candidates(request_of(tmp_path, methods=methods, keeps=(0.5,)), SHAPE)
    assert [candidate.name for candidate in candidates if candidate.task == "one"] == [
        "one-reap-0.5-0",
        "one-reap+owl-0.5-0",
        "one-moe-i2-0.5-0",
    ]
    assert {method_of(candidate.method) for candidate in candidates} == {"reap", "moe-i2"}
    given = read_methods(["moe-i2"], ["moe-i2:ratios=given"], ["owl", "uniform"])
    assert list(given) == ["moe-i2+owl", "moe-i2"]
    assert read_methods(["reap"], ["reap:layers=owl"]) == {"reap+owl": {"layers": "owl"}}
    with pytest.raises(PlanError, match="must be uniform for moe-i2"):
        read_methods(["reap,moe-i2"], [], ["owl"])
    with pytest.raises(PlanError, match="layers must be uniform or owl, got 'best'"):
        read_methods(["reap"], [], ["uniform", "best"])
    with pytest.raises(SweepError, match="each way once, got owl, owl"):
        read_methods(["reap"], [], ["owl", "owl"])


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"keeps": (0.5, 1.5)}, r"in \(0, 1\], got 1.5"),
        ({"keeps": (0.0,)}, r"in \(0, 1\], got 0"),
        ({"keeps": (0.5, 0.50)}, "one keep or more, each once"),
        ({"keeps": ()}, "one keep or more"),
        ({"seeds": (1, 1)}, "one seed or more, each once"),
        ({"seeds": (-1,)}, r"seeds must be in \[0, inf\)"),
        ({"max_drop": -0.1}, r"--max-drop must be in \[0, inf\), got -0.1"),
        ({"max_drop": float("nan")}, "--max-drop must be"),
        ({"held_out": {"three": "f"}}, "must name a task of --task, got three beside one, two"),
        ({"methods": {}}, "one method or more"),
    ],
)
def test_what_is_out_of_range_is_refused(
    tmp_path: Path, changes: dict[str, Any], rule: str
) -> None:
    with pytest.raises(SweepError, match=rule):
        request_of(tmp_path, **changes).check()


def test_methods_that_do_not_draw_decide_the_same_with_every_seed(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    path = make_checkpoint("mixtral")
    file = tmp_path / "t.jsonl"
    ids = torch.randint(0, 96, (8, 30), generator=torch.Generator().manual_seed(0))
    lines = [" ".join(f"w{token}" for token in row) for row in ids.tolist()]
    file.write_text("".join(f'{{"text": "{line}"}}\n' for line in lines))
    model = load_model(path)
    statistics = collect(model, [TaskFile.load("t", file)], load_tokenizer(path))
    cheap = [name for name, method in METHODS.items() if not method.needs_forward]
    assert len(cheap) >= 5
    for name in cheap:
        decisions = {
            hash_decision(make_plan(statistics, "t", name, (5, 5, 5), seed=seed))
            for seed in range(2)
        }
        assert len(decisions) == 1 or METHODS[name].stochastic, name
        # Keeping all is the same decision, whoever takes it.
        whole = make_plan(statistics, "t", name, (8, 8, 8), seed=3)
        assert hash_decision(whole) == hash_decision(keep_all(model.shape))
