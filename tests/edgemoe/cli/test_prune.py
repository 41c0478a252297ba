"""``edgemoe prune``: what it decides about layers, and the workers that search for it."""

from __future__ import annotations

import json
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import pytest

from edgemoe.layerwise.provider import open_layers
from edgemoe.oracle.oracle import LayerOracle
from edgemoe.oracle.outliers import outlier_ratios

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from click.testing import Result

    Answer = Callable[..., dict[str, Any]]

WIDE = ("--layers", "owl", "--set", "owl-range=0.3", "--set", "owl-multiple=2")


@pytest.fixture(scope="module")
def statistics(road: Path, answer: Answer) -> Path:
    path = road / "layers.st"
    answer("calibrate", road / "moe", "--task", f"code={road}/code.jsonl", "-o", path)
    return path


def test_layers_with_more_outliers_keep_more(
    road: Path, statistics: Path, answer: Answer, tmp_path: Path
) -> None:
    from edgemoe.calibrate.statistics import Statistics

    asked = ("prune", road / "moe", "--stats", statistics, "--task", "code", "--method", "reap")
    told = answer(*asked, "--keep", 0.5, *WIDE, "-o", tmp_path / "owl.json")
    windows = Statistics.load(statistics).task("code").windows
    oracle = LayerOracle(open_layers(road / "moe"), windows).fewer(1024)
    first, second = outlier_ratios(oracle, 2.0)
    # Two layers of eight experts: 0.3 of eight is two more of one and two fewer of the other.
    assert told["experts_per_layer"] == ([6, 2] if first > second else [2, 6])
    plan = json.loads((tmp_path / "owl.json").read_text())
    assert plan["options"] == {
        "keep_experts": [4, 4],
        "layers": "owl",
        "owl_multiple": 2.0,
        "owl_range": 0.3,
    }
    pruned = tmp_path / "pruned"
    answer("apply", road / "moe", "--plan", tmp_path / "owl.json", "-o", pruned)
    assert answer("inspect", pruned)["experts_per_layer"] == told["experts_per_layer"]

    answer(*asked, "--keep", 0.5, "-o", tmp_path / "one.json")
    answer(*asked, "--keep-experts", 4, "--layers", "uniform", "-o", tmp_path / "two.json")
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    assert json.loads((tmp_path / "one.json").read_text())["options"] == {
        "keep_experts": [4, 4]
    }


def test_bad_input_is_refused(
    road: Path, statistics: Path, invoke: Callable[..., Result], tmp_path: Path
) -> None:
    def refuse(*changes: object, status: int = 1) -> str:
        asked = ("--stats", statistics, "--task", "code", "-o", tmp_path / "plan.json")
        result = invoke("prune", road / "moe", *asked, *changes)
        assert result.exit_code == status, result.output
        assert not list(tmp_path.iterdir())
        return " ".join(result.stderr.split())

    half = ("--method", "reap", "--keep", 0.5)
    assert "must be uniform for moe-i2" in refuse(
        "--method", "moe-i2", "--keep", 0.5, "--layers", "owl"
    )
    lists = ("--method", "reap", "--keep-experts", "4,6", "--layers", "owl")
    assert "give --keep, or one number" in refuse(*lists, status=2)
    assert "cannot be used with reap" in refuse(*half, "--workers", 2, status=2)
    assert "'best' is not one of" in refuse(*half, "--layers", "best", status=2)
    assert "must come with --layers owl" in refuse(*half, "--set", "owl-range=0.2")


@pytest.mark.slow
@pytest.mark.parametrize(
    "given",
    [
        ("moe-i2", "population=8", "generations=3", "importance-tokens=100"),
        ("naee", "exhaustive=10", "tokens=100"),
    ],
    ids=lambda given: given[0],
)
def test_workers_write_the_plan_of_one_process(
    road: Path, statistics: Path, answer: Answer, tmp_path: Path, given: tuple[str, ...]
) -> None:
    asked: tuple[object, ...] = ("--stats", statistics, "--task", "code", "--keep", 0.5)
    method, *options = given
    asked += ("--method", method, *(f"--set={option}" for option in options))
    asked += ("--seed", 7, "--threads", 1)
    answer("prune", road / "moe", *asked, "-o", tmp_path / "one.json")
    answer("prune", road / "moe", *asked, "--workers", 2, "-o", tmp_path / "two.json")
    assert (tmp_path / "two.json").read_bytes() == (tmp_path / "one.json").read_bytes()
    plan = json.loads((tmp_path / "one.json").read_text())
    assert sum(len(layer["experts"]) for layer in plan["layers"]) == 8


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")
def test_a_ray_cluster_writes_the_plan_of_one_process(
    road: Path, statistics: Path, answer: Answer, tmp_path: Path
) -> None:
    asked: tuple[object, ...] = ("--stats", statistics, "--task", "code", "--keep", 0.5)
    asked += ("--method", "moe-i2", "--set", "population=8", "--set", "ratios=given")
    asked += ("--threads", 1, *WIDE)
    answer("prune", road / "moe", *asked, "-o", tmp_path / "one.json")
    spread = ("--ray", "local", "--workers", 2)
    answer("prune", road / "moe", *asked, *spread, "-o", tmp_path / "two.json")
    assert (tmp_path / "two.json").read_bytes() == (tmp_path / "one.json").read_bytes()


def test_a_sweep_compares_a_method_with_and_without(
    road: Path, answer: Answer, tmp_path: Path
) -> None:
    report = tmp_path / "report"
    lines = [json.loads(line) for line in (road / "code.jsonl").read_text().splitlines()]
    file = tmp_path / "code.jsonl"
    file.write_text(
        "".join(
            json.dumps({"text": f"{n} {line['text']}"}) + "\n" for n, line in enumerate(lines)
        )
    )
    asked: tuple[object, ...] = ("--method", "reap", "--keep", 0.5, "--layers", "uniform,owl")
    asked += ("--set", "reap:owl-range=0.3", "--set", "reap:owl-multiple=2")
    asked += ("--calibration-tokens", 500, "--held-out-tokens", 200, "--max-drop", 1000)
    asked += ("--accept-large-drop", "--accept-weak-evidence")
    told = answer("sweep", road / "moe", f"--task=code={file}", *asked, "-o", report)
    rows = {row["method"]: row for row in told["rows"]}
    assert list(rows) == ["unpruned", "reap", "reap+owl"]
    assert rows["reap"]["experts"] == rows["reap+owl"]["experts"] == 8
    kept = {}
    for name in ("reap", "reap+owl"):
        plan = json.loads((report / rows[name]["plan"]).read_text())
        assert plan["method"] == "reap"
        kept[name] = [len(layer["experts"]) for layer in plan["layers"]]
    assert kept["reap"] == [4, 4]
    assert sorted(kept["reap+owl"]) == [2, 6]
    assert told["methods"]["reap"]["options"] == {}
    owl = {"layers": "owl", "owl_multiple": 2.0, "owl_range": 0.3}
    assert told["methods"]["reap+owl"]["options"] == owl
    assert set(told["thresholds"]["code"]["by_method"]) == {"reap", "reap+owl"}
