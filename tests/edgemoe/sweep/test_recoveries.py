"""A sweep recovers as `edgemoe recover` does, wherever it runs and whenever it stops."""

from __future__ import annotations

import csv
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from edgemoe.apply.in_memory import apply_plan
from edgemoe.errors import RecoveryError, SweepError
from edgemoe.evaluate.drop import paired_drop
from edgemoe.evaluate.evaluation import evaluate
from edgemoe.evaluate.torch_scorer import TorchScorer
from edgemoe.models.checkpoint import load_model, load_tokenizer
from edgemoe.models.saving import save_model
from edgemoe.parallel.workers import InProcess, Processes
from edgemoe.plans.plan import Plan
from edgemoe.recover.options import RecoverOptions
from edgemoe.recover.recovery import recover_checkpoint
from edgemoe.resume import ResumableInterrupt
from edgemoe.sweep.methods import read_methods
from edgemoe.sweep.recover_job import run_recover_job
from edgemoe.sweep.recoveries import read_recoveries
from edgemoe.sweep.request import SweepRequest
from edgemoe.sweep.sweep import run_sweep
from edgemoe.tasks import TaskFile

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from edgemoe.sweep.recover_job import RecoverJob

    Read = Callable[[Path], dict[str, bytes]]

RECOVERIES = ["least-squares:max-tokens=500", "router-kd:steps=4,learning-rate=1e-2"]


def request_of(folder: Path, output: Path, **changes: Any) -> SweepRequest:
    given: dict[str, Any] = {
        "model": folder / "moe",
        "output": output,
        "tasks": {name: folder / f"{name}.jsonl" for name in ("low", "high")},
        "methods": read_methods(["random", "camera"], []),
        "recoveries": read_recoveries(RECOVERIES),
        "keeps": (0.5,),
        "max_drop": 2.0,
        "accept_large_drop": True,
        "accept_weak_evidence": True,
        "threads": 1,
    }
    return SweepRequest(**{**given, **changes})


@pytest.fixture(scope="module")
def swept(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("recovered") / "report"
    run_sweep(request_of(folder, output), InProcess())
    return output


def read_rows(report: Path) -> list[dict[str, str]]:
    with (report / "sweep.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_scores_are_those_of_checkpoints_recovered_by_hand(
    folder: Path, swept: Path, tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    rows = read_rows(swept)
    # The unpruned model, and two cuts of two tasks, each by itself and in two ways, on two.
    assert len(rows) == 2 * (1 + 2 * 2 * 3)
    held_out, lines = (
        {name: TaskFile.load(name, swept / kind / f"{name}.jsonl") for name in ("low", "high")}
        for kind in ("held-out", "calibration")
    )
    tokenizer = load_tokenizer(folder / "moe")
    whole = TorchScorer(load_model(folder / "moe"))
    before = {name: evaluate(whole, task, tokenizer) for name, task in held_out.items()}
    assert not set(lines["low"].records) & set(held_out["low"].records)
    changed = {}
    for number, row in enumerate(rows):
        if row["task"] != "low" or not row["recovery"]:
            continue
        small, back = tmp_path / f"small{number}", tmp_path / f"back{number}"
        small.mkdir()
        plan = Plan.load(swept / row["plan"])
        save_model(apply_plan(load_model(folder / "moe"), plan), small, source=folder / "moe")
        recover_checkpoint(
            small,
            [lines["low"]],
            back,
            method=row["recovery"],
            teacher=folder / "moe",
            options=read_recoveries(RECOVERIES)[row["recovery"]],
        )
        score = evaluate(TorchScorer(load_model(back)), held_out[row["judged_on"]], tokenizer)
        assert float(row["score"]) == score.value
        drop = paired_drop(before[row["judged_on"]], score)
        assert float(row["drop"]) == pytest.approx(drop.value, abs=1e-12)
        (alone,) = (
            other
            for other in rows
            if (other["plan"], other["judged_on"]) == (row["plan"], row["judged_on"])
            and not other["recovery"]
        )
        assert alone["checkpoint_bytes"] == row["checkpoint_bytes"]
        changed[row["method"], row["recovery"]] = alone["score"] != row["score"]
    assert changed == {
        ("random", "least-squares"): True,
        ("random", "router-kd"): True,
        ("camera", "least-squares"): True,
        # Nothing was better than what it began with.
        ("camera", "router-kd"): False,
    }


def test_the_threshold_of_a_method_and_of_its_recoveries_stand_apart(
    folder: Path, tmp_path: Path
) -> None:
    request = request_of(
        folder,
        tmp_path / "report",
        methods={"random": {}},
        recoveries=read_recoveries(["least-squares"]),
        max_drop=1000.0,
        accept_large_drop=True,
        accept_weak_evidence=True,
    )
    outcome = run_sweep(request, InProcess())
    for name, threshold in outcome.thresholds.items():
        assert list(threshold.by_method) == ["random", "random, then least-squares"]
        for series, point in threshold.by_method.items():
            assert point is not None
            row = outcome.row_at(name, point)
            assert row.series == series
            other = outcome.worst_other(row)
            assert other is not None
            assert (other.recovery, other.plan) == (row.recovery, row.plan)
    # Judged by what the recovered cut scores, not by what the cut itself scores.
    rows = {(row.task, row.keep, row.recovery): row for row in outcome.own_rows}
    for (task, keep, recovery), row in rows.items():
        if recovery:
            assert row.drop.value < rows[task, keep, None].drop.value


@pytest.mark.slow
def test_interrupted_and_on_workers_it_writes_the_same(
    folder: Path,
    swept: Path,
    tmp_path: Path,
    read_report: Read,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / "report"
    done: list[str] = []

    def recover_some(job: RecoverJob) -> None:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(job.key)
        run_recover_job(job)

    monkeypatch.setattr("edgemoe.sweep.sweep.run_recover_job", recover_some)
    with pytest.raises(ResumableInterrupt):
        run_sweep(request_of(folder, output), InProcess())
    monkeypatch.undo()
    kept = {
        file: file.stat().st_mtime_ns
        for file in tmp_path.glob("report.partial/recovered/*.json")
    }
    assert len(kept) == 3
    assert not [path for path in tmp_path.glob("report.partial/recovered/*") if path.is_dir()]
    run_sweep(request_of(folder, output), Processes(2))
    assert read_report(output) == read_report(swept)


def test_what_is_wrong_is_refused(folder: Path, tmp_path: Path) -> None:
    assert read_recoveries(["lora:rank=4,kd-weight=0.25"]) == {
        "lora": RecoverOptions(rank=4, kd_weight=0.25)
    }
    for text, said in {
        "distil": "the method must be one of least-squares",
        "lora:steps": "must be NAME=VALUE with a name of steps, learning-rate",
        "lora:depth=4": "must be NAME=VALUE",
        "lora:rank=4.5": "option rank of lora must be an integer, got '4.5'",
        "lora:kd-weight=much": "option kd-weight of lora must be a number",
        "lora:kd-weight=2": r"kd_weight must be in \[0, 1\]",
        "router-kd:rank=4": "rank must not be given for router-kd",
    }.items():
        with pytest.raises(RecoveryError, match=said):
            read_recoveries([text])
    with pytest.raises(SweepError, match="each recovery once, got lora twice"):
        read_recoveries(["lora", "lora:rank=4"])
    output = tmp_path / "report"
    with pytest.raises(SweepError, match="--recover must have a model that fits"):
        run_sweep(replace(request_of(folder, output), memory_limit_bytes=1000), InProcess())
    assert not list(tmp_path.iterdir())
