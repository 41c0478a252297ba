"""A function of the API gives, byte for byte, what its command gives."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner

import edgemoe
from edgemoe.api.carve import carve
from edgemoe.api.merge_statistics import merge_statistics
from edgemoe.cli import main

if TYPE_CHECKING:
    from pathlib import Path

    from edgemoe.progress import ProgressEvent


def command(*arguments: object) -> dict[str, Any]:
    done = CliRunner().invoke(main, [*map(str, arguments), "--json"])
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def content(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def test_calibrate_prune_apply_evaluate(folder: Path, tmp_path: Path) -> None:
    moe, data, held_out = (folder / name for name in ("moe", "code.jsonl", "code.test.jsonl"))
    ours, theirs = tmp_path / "api", tmp_path / "cli"
    ours.mkdir()
    theirs.mkdir()

    statistics = edgemoe.calibrate(moe, {"code": data}, ours / "stats", max_tokens=500)
    command("calibrate", moe, f"--task=code={data}", "-o", theirs / "stats", "--max-tokens=500")
    plan = edgemoe.prune(moe, ours / "stats", "code", "reap", ours / "plan", keep=0.5)
    told = command(
        *("prune", moe, "--stats", theirs / "stats", "--task=code", "--method=reap"),
        *("--keep=0.5", "-o", theirs / "plan"),
    )
    assert told["sha256"] == plan.sha256
    report = edgemoe.apply_plan(str(moe), ours / "plan", str(ours / "out"))
    told = command("apply", moe, "--plan", theirs / "plan", "-o", theirs / "out")
    assert tuple(told["experts_per_layer"]) == report.plan.experts_per_layer
    for name in ("stats", "plan", "out"):
        assert content(ours / name) == content(theirs / name)

    task = edgemoe.TaskFile.load("code", held_out)
    evaluation = edgemoe.evaluate(ours / "out", task, k_cap=1)
    told = command("evaluate", theirs / "out", f"--task=code={held_out}", "--k-cap=1")
    experts = told.pop("experts_per_token")
    assert json.loads(json.dumps(evaluation.to_dict(details=True))) == told
    assert evaluation.experts_per_token == experts == 1

    # In memory, without a file in between.
    found = edgemoe.calibrate(moe, [edgemoe.TaskFile.load("code", data)], max_tokens=500)
    assert found.sha256 == statistics.sha256
    assert (
        edgemoe.prune(moe, found, {"code": 2.0}, "reap", keep_experts=4).layers == plan.layers
    )
    model = edgemoe.apply_plan(moe, plan)
    assert model.shape.experts_per_layer == plan.experts_per_layer
    assert sorted(path.name for path in ours.iterdir()) == ["out", "plan", "stats"]


def test_shards_add_up_as_merge_stats_adds_them(folder: Path, tmp_path: Path) -> None:
    tasks = {"code": folder / "code.jsonl"}
    halves = [
        edgemoe.calibrate(folder / "moe", tasks, tmp_path / f"{index}", shard=(index, 2))
        for index in range(2)
    ]

    merged = merge_statistics([halves[0], tmp_path / "1"], tmp_path / "ours")
    command("merge-stats", tmp_path / "0", tmp_path / "1", "-o", tmp_path / "theirs")

    assert content(tmp_path / "ours") == content(tmp_path / "theirs")
    assert merged.sha256 == edgemoe.calibrate(folder / "moe", tasks).sha256


def test_decompose_and_allocate(folder: Path, tmp_path: Path) -> None:
    moe, data = folder / "moe", folder / "code.jsonl"
    statistics = edgemoe.calibrate(moe, {"code": data}, tmp_path / "stats")
    options = {"multiple": 4, "importance": "frequency"}
    ranked = edgemoe.decompose(
        moe, statistics, "code", "svd", 0.6, tmp_path / "ours", options=options
    )
    told = command(
        *("decompose", moe, "--stats", tmp_path / "stats", "--task=code", "--method=svd"),
        *("--param-ratio=0.6", "--set=multiple=4", "--set=importance=frequency"),
        *("-o", tmp_path / "theirs"),
    )
    assert told["expert_parameters_after"] == ranked.parameters_after
    assert content(tmp_path / "ours") == content(tmp_path / "theirs")

    allocated = edgemoe.allocate(
        moe, {"code": data}, output=tmp_path / "k", plan=ranked.plan, mean_k=1.5
    )
    told = command(
        *("allocate", moe, f"--task=code={data}", "--plan", tmp_path / "theirs"),
        *("--mean-k=1.5", "-o", tmp_path / "also"),
    )
    assert told["mean_k"] == allocated.mean_k < allocated.mean_k_before
    assert content(tmp_path / "k") == content(tmp_path / "also")


@pytest.mark.slow
def test_recover_carve_and_sweep(folder: Path, tmp_path: Path) -> None:
    moe, data = folder / "moe", folder / "code.jsonl"
    edgemoe.recover(
        *(moe, {"code": data}, "lora", tmp_path / "recovered"),
        steps=2,
        batch_tokens=64,
        learning_rate=0.01,
        alpha=32,
    )
    given: tuple[object, ...] = ("--steps=2", "--batch-tokens=64", "--learning-rate=0.01")
    given += (f"--task=code={data}", "--method=lora", "--alpha=32")
    command("recover", moe, *given, "-o", tmp_path / "r")
    assert content(tmp_path / "recovered") == content(tmp_path / "r")

    carve(folder / "dense", tmp_path / "carved", experts=4, top_k=2, data=data)
    given = ("--experts=4", "--top-k=2", "--data", data)
    command("carve", folder / "dense", "-o", tmp_path / "c", *given)
    assert content(tmp_path / "carved") == content(tmp_path / "c")

    edgemoe.sweep(
        moe,
        {"code": data},
        ["uncurl", "reap"],
        tmp_path / "report",
        options={"reap": {"owl_range": 0.3, "owl-multiple": 2}},
        layers=["uniform", "owl"],
        keeps=[0.5],
        seeds=[0, 1],
        max_drop=1,
        accept_weak_evidence=True,
    )
    given = (
        "--method=uncurl,reap",
        "--keep=0.5",
        "--seeds=2",
        "--max-drop=1",
        "--accept-weak-evidence",
    )
    given += ("--layers=uniform,owl", "--set=reap:owl-range=0.3", "--set=reap:owl-multiple=2")
    command("sweep", moe, f"--task=code={data}", "-o", tmp_path / "s", *given)
    ours, theirs = content(tmp_path / "report"), content(tmp_path / "s")
    assert {name for name in ours if ours[name] != theirs[name]} <= {"times.csv"}
    assert set(ours) == set(theirs)


def test_progress_goes_to_the_callback(folder: Path) -> None:
    heard: list[ProgressEvent] = []

    edgemoe.calibrate(folder / "moe", {"code": folder / "code.jsonl"}, on_progress=heard.append)

    assert heard[0].done == 0
    assert heard[-1].done == heard[-1].total == 4 * 28  # layers times windows


def test_what_commands_remark_is_logged(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = {"code": folder / "code.jsonl"}
    statistics = edgemoe.calibrate(folder / "moe", data)
    plan = edgemoe.prune(folder / "moe", statistics, "code", "frequency", keep=0.5)
    edgemoe.apply_plan(folder / "moe", plan, tmp_path / "out")

    with caplog.at_level(logging.WARNING, "edgemoe.api"):
        edgemoe.evaluate(tmp_path / "out", data, calibration_lines="warn", max_tokens=100)

    assert "28 of 28 lines" in caplog.text
    assert not logging.getLogger("edgemoe.api").handlers
