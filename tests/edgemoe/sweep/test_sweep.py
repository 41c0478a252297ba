"""A sweep's scores are those of its plans, wherever it runs and however often it stops."""

from __future__ import annotations

import csv
import importlib
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from edgemoe.apply.in_memory import apply_plan
from edgemoe.calibrate.statistics import Statistics
from edgemoe.errors import OutputError, SpreadError, SweepError, TaskFileError
from edgemoe.evaluate.drop import paired_drop
from edgemoe.evaluate.evaluation import evaluate
from edgemoe.evaluate.torch_scorer import TorchScorer
from edgemoe.layerwise.provider import InMemoryLayers
from edgemoe.models.checkpoint import load_model, load_tokenizer
from edgemoe.oracle.oracle import LayerOracle
from edgemoe.parallel.workers import InProcess, Processes, RayCluster
from edgemoe.plans.plan import Plan
from edgemoe.prune.registry import count_for, make_plan
from edgemoe.resume import ResumableInterrupt, partial_path
from edgemoe.sweep.jobs import run_judge_job, run_plan_job
from edgemoe.sweep.methods import method_of, read_methods
from edgemoe.sweep.request import SweepRequest
from edgemoe.sweep.sweep import run_sweep
from edgemoe.tasks import TaskFile
from tests.edgemoe.sweep.conftest import LINES, write_rows

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from edgemoe.sweep.jobs import JudgeJob, PlanJob

    Read = Callable[[Path], dict[str, bytes]]

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")


def request_of(folder: Path, output: Path, **changes: Any) -> SweepRequest:
    given: dict[str, Any] = {
        "model": folder / "moe",
        "output": output,
        "tasks": {name: folder / f"{name}.jsonl" for name in ("low", "high")},
        "methods": read_methods(["reap", "random"], []),
        "keeps": (1.0, 0.75, 0.5),
        "seeds": (0, 1),
        "max_drop": 2.0,
        "accept_large_drop": True,
        "accept_weak_evidence": True,
        "threads": 1,
    }
    return SweepRequest(**{**given, **changes})


@pytest.fixture(scope="module")
def swept(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A report, and the decisions that were judged for it, in order."""
    output = tmp_path_factory.mktemp("swept") / "report"
    judged: list[str] = []

    def judge(job: JudgeJob) -> None:
        judged.append(job.decision)
        run_judge_job(job)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edgemoe.sweep.sweep.run_judge_job", judge)
        run_sweep(request_of(folder, output), InProcess())
    assert not partial_path(output).exists()
    return output, judged


def read_rows(report: Path) -> list[dict[str, str]]:
    with (report / "sweep.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_scores_are_those_of_the_plans_applied_to_the_model(
    folder: Path, swept: tuple[Path, list[str]]
) -> None:
    report, _ = swept
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(folder / "moe")
    held_out = {
        name: TaskFile.load(name, report / "held-out" / f"{name}.jsonl")
        for name in ("low", "high")
    }
    whole = TorchScorer(load_model(folder / "moe"))
    before = {name: evaluate(whole, task, tokenizer) for name, task in held_out.items()}
    rows = read_rows(report)
    # The unpruned model, and (3 fractions of reap, 3 of random with 2 seeds) for 2 tasks.
    assert len(rows) == 2 * (1 + 2 * (3 + 6))
    assert {row["plan"] for row in rows[2:]} == {
        f"plans/{file.name}" for file in (report / "plans").iterdir()
    }
    for row in rows:
        score = before[row["judged_on"]]
        if row["plan"]:
            plan = Plan.load(report / row["plan"])
            assert (plan.method, plan.task, str(plan.seed)) == (
                row["method"],
                row["task"],
                row["seed"],
            )
            assert plan.sha256 == row["plan_sha256"]
            small = apply_plan(load_model(folder / "moe"), plan)
            score = evaluate(TorchScorer(small), held_out[row["judged_on"]], tokenizer)
            assert sum(plan.experts_per_layer) == int(row["experts"])
            assert float(row["kept_fraction"]) == int(row["experts"]) / 16
        drop = paired_drop(before[row["judged_on"]], score)
        assert float(row["score"]) == score.value
        assert (float(row["ci95_low"]), float(row["ci95_high"])) == score.ci95
        assert float(row["drop"]) == pytest.approx(drop.value, abs=1e-12)
        ends = (float(row["drop_ci95_low"]), float(row["drop_ci95_high"]))
        assert ends == pytest.approx(drop.ci95, abs=1e-12)
        assert (int(row["lines"]), int(row["tokens"])) == (LINES // 4, 14 * LINES // 4)


def test_lines_that_judge_were_not_calibrated(folder: Path, swept: tuple[Path, Any]) -> None:
    report, _ = swept
    for name in ("low", "high"):
        lines = (folder / f"{name}.jsonl").read_text().splitlines()
        judging = (report / "held-out" / f"{name}.jsonl").read_text().splitlines()
        assert judging == lines[3::4]


def test_equal_decisions_are_judged_once(swept: tuple[Path, list[str]]) -> None:
    report, judged = swept
    plans = [Plan.load(file) for file in (report / "plans").iterdir()]
    decisions = {
        tuple(tuple(e.members for e in layer.experts) for layer in plan.layers)
        for plan in plans
    }
    # Keeping all is one decision of six plans, and chance chooses the same for every task.
    assert len(plans) == 18
    assert len(judged) == len(set(judged)) == len(decisions) <= 1 + 2 * 2 + 2 * 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "executor",
    [Processes(2), pytest.param(RayCluster(address="local", count=2), marks=needs_ray)],
    ids=lambda executor: type(executor).__name__,
)
def test_workers_write_the_report_of_one_process(
    folder: Path,
    swept: tuple[Path, Any],
    tmp_path: Path,
    read_report: Read,
    executor: Processes | RayCluster,
) -> None:
    output = tmp_path / "report"
    run_sweep(request_of(folder, output), executor)
    assert read_report(output) == read_report(swept[0])


def test_a_model_larger_than_memory_gives_the_same_scores(
    folder: Path, swept: tuple[Path, Any], tmp_path: Path, read_report: Read
) -> None:
    output = tmp_path / "report"
    outcome = run_sweep(request_of(folder, output, memory_limit_bytes=1000), InProcess())
    assert not outcome.whole
    assert "one decoder layer at a time" in outcome.notes[-1]
    one, other = read_report(output), read_report(swept[0])
    assert one.keys() == other.keys()
    assert {name for name in one if one[name] != other[name]} == {"report.json", "report.md"}


def test_an_interrupted_sweep_goes_on_with_more_methods(
    folder: Path,
    swept: tuple[Path, Any],
    tmp_path: Path,
    read_report: Read,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / "report"
    left = 3
    done: list[str] = []

    def make_counted(job: PlanJob) -> None:
        done.append(job.candidate.name)
        run_plan_job(job)

    def judge_some(job: JudgeJob) -> None:
        if len(done) - plans == left:
            raise KeyboardInterrupt
        done.append(job.decision)
        run_judge_job(job)

    monkeypatch.setattr("edgemoe.sweep.sweep.run_plan_job", make_counted)
    monkeypatch.setattr("edgemoe.sweep.sweep.run_judge_job", judge_some)
    plans = 2 * 3
    first = request_of(folder, output, methods={"reap": {}})
    with pytest.raises(ResumableInterrupt, match="the same command goes on from there"):
        run_sweep(first, InProcess())
    assert len(done) == plans + left
    assert not output.exists()
    # Other lines are other work, and the finished work of these is safe from it.
    with pytest.raises(OutputError, match="with another options"):
        run_sweep(replace(first, held_out_tokens=40), InProcess())

    done.clear()
    plans, left = 2 * 6, 99
    run_sweep(request_of(folder, output), InProcess())
    assert read_report(output) == read_report(swept[0])
    assert [name for name in done[:plans] if "-random-" not in name] == []
    # Four cuts of reap and two of each seed, of which three were judged before, with the whole.
    assert len(done) == plans + 1 + 4 + 4 - 3


@pytest.mark.slow
def test_kills_change_nothing(
    folder: Path, swept: tuple[Path, Any], tmp_path: Path, read_report: Read
) -> None:
    output = tmp_path / "report"
    work = partial_path(output)
    tasks = [f"--task={name}={folder / name}.jsonl" for name in ("low", "high")]
    command = [sys.executable, "-m", "edgemoe.cli", "sweep", str(folder / "moe"), *tasks]
    command += ["--method=reap,random", "--keep=1,0.75,0.5", "--seeds=2", "--max-drop=2"]
    command += ["--accept-large-drop", "--accept-weak-evidence"]
    command += ["--threads=1", "-o", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    # Of 18 plans and 9 judgements; what a run finished is there when the next one starts.
    # Workers of a killed command end a moment later than it does.
    for pattern, least, workers in (
        ("plans/*.json", 5, []),
        ("scores/*.json", 3, ["--workers=2"]),
    ):
        with subprocess.Popen([*command, *workers], env=environment) as run:
            while run.poll() is None and len(list(work.glob(pattern))) < least:
                time.sleep(0.002)
            run.kill()
        assert run.returncode == -signal.SIGKILL
        assert not output.exists()
    kept = {file: file.stat().st_mtime_ns for file in work.glob("*s/*.json")}
    assert len(kept) >= 18 + 3
    subprocess.run(command, check=True, env=environment, capture_output=True)

    assert read_report(output) == read_report(swept[0])
    assert not list(tmp_path.glob("*.partial"))


def test_accuracy_is_judged_in_points_beside_perplexity(folder: Path, tmp_path: Path) -> None:
    random = np.random.Generator(np.random.PCG64(3))
    rows: list[dict[str, object]] = []
    for _ in range(48):
        first, right, wrong = random.choice(np.arange(3, 96), 3, replace=False)
        choices = [f" w{right} w{right}", f" w{wrong} w{wrong}"]
        rows.append({"prompt": f"w{first}", "choices": choices, "answer": 0})
    write_rows(tmp_path / "pick.jsonl", rows)
    tasks = {"pick": tmp_path / "pick.jsonl", "low": folder / "low.jsonl"}
    request = request_of(
        folder, tmp_path / "report", tasks=tasks, methods={"reap": {}}, seeds=(0,), max_drop=1.0
    )
    with pytest.raises(SweepError, match=r"in \[0, 1\] for a task of choices, got 2: .*0\.02"):
        run_sweep(replace(request, max_drop=2.0), InProcess())
    alone = replace(request, tasks={"pick": tmp_path / "pick.jsonl"})
    with pytest.raises(TaskFileError, match=r"12 lines judge, fewer than 20\. Add lines, or"):
        run_sweep(replace(alone, accept_weak_evidence=False), InProcess())
    outcome = run_sweep(request, InProcess())
    before = outcome.unpruned.scores["pick"]
    assert (before.metric, before.n) == ("accuracy", 12)
    for row in outcome.own_rows:
        if row.task == "pick" and row.keep < 1:
            assert row.drop.value == before.value - row.score.value
            # Twelve lines never make a drop of less than some points sure.
            assert row.drop.ci95[1] >= row.drop.value + 0.1
    threshold = outcome.thresholds["pick"].best
    assert threshold is not None
    assert threshold.keep == 0.5
    other = outcome.worst_other(outcome.row_at("pick", threshold))
    assert other is not None
    assert other.judged_on == "low"
    assert "12 lines: with fewer than 20" in outcome.notes[0]
    assert "pick rests on weak evidence" in outcome.notes[1]
    assert (outcome.chance("pick"), outcome.chance("low")) == (0.5, 96)


def test_what_cannot_be_done_is_refused_before_anything_is_measured(
    folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "report"
    parameters = sum(p.numel() for p in load_model(folder / "moe").model.parameters())
    limit = parameters * 4 * 2 + 3
    request = request_of(folder, output, memory_limit_bytes=limit)
    with pytest.raises(SpreadError, match=r"got 3 workers. Use --workers 2 or fewer"):
        run_sweep(request, Processes(3))
    write_rows(tmp_path / "short.jsonl", [{"text": f"w{n} w4"} for n in range(7)])
    with pytest.raises(TaskFileError, match="8 lines or more"):
        run_sweep(replace(request, tasks={"short": tmp_path / "short.jsonl"}), InProcess())
    with pytest.raises(TaskFileError, match=r"2 lines or more.*Raise --held-out-tokens"):
        run_sweep(replace(request, held_out_tokens=15), InProcess())
    output.mkdir()
    with pytest.raises(OutputError, match="must not exist"):
        run_sweep(request, InProcess())
    with pytest.raises(OutputError, match="must not contain what is read"):
        run_sweep(replace(request, output=folder, force=True), InProcess())
    output.rmdir()
    assert [file.name for file in tmp_path.iterdir()] == ["short.jsonl"]


def test_what_fractions_share_is_measured_once_for_each_task(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []

    def counted(ask: Callable[..., Any], name: str) -> Callable[..., Any]:
        def count(*given: Any) -> Any:
            measured.append(name)
            return ask(*given)

        return count

    for module, name in (
        ("heapr", "importances"),
        ("moe_i2", "loss_increases"),
        ("owl", "outlier_ratios"),
    ):
        found = importlib.import_module(f"edgemoe.prune.{module}")
        monkeypatch.setattr(found, name, counted(getattr(found, name), name))
    methods = read_methods(
        ["heapr,moe-i2,reap"],
        ["moe-i2:population=4", "moe-i2:generations=1", "moe-i2:importance-tokens=20"],
        ["uniform", "owl"],
    )
    run_sweep(request_of(folder, tmp_path / "report", methods=methods, seeds=(0,)), InProcess())
    assert Counter(measured) == dict.fromkeys(
        ["importances", "loss_increases", "outlier_ratios"], 2
    )
    # As a command of its own decides it.
    statistics = Statistics.load(tmp_path / "report/statistics.safetensors")
    for name, given in methods.items():
        plan = make_plan(
            statistics,
            "low",
            method_of(name),
            count_for(method_of(name), statistics.shape, 0.5),
            options=given,
            open_oracle=lambda windows: LayerOracle(
                InMemoryLayers(load_model(folder / "moe")), windows
            ),
        )
        swept = (tmp_path / f"report/plans/low-{name}-0.5-0.json").read_text()
        assert swept == plan.to_json()
