"""``edgemoe sweep`` from the command line, and what its report is good for."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.edgemoe.cli.conftest import CODE, PROSE

if TYPE_CHECKING:
    from collections.abc import Callable

    from click.testing import Result

    Answer = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def tasks(road: Path) -> list[str]:
    """``--task`` arguments of two tasks whose lines all differ."""
    arguments = []
    for name, texts in {"code": CODE, "prose": PROSE}.items():
        lines = [texts[n % 4] * (1 + n // 4) + texts[(n + 1) % 4] for n in range(24)]
        file = road / f"{name}.different.jsonl"
        file.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
        arguments.append(f"--task={name}={file}")
    return arguments


@pytest.mark.slow
def test_two_methods_two_fractions_two_tasks_two_workers(
    road: Path,
    tasks: list[str],
    answer: Answer,
    invoke: Callable[..., Result],
    tmp_path: Path,
) -> None:
    report = tmp_path / "report"
    asked: tuple[object, ...]
    asked = ("--method", "reap", "--method", "frequency", "--keep", "0.75,0.5", "--threads", 1)
    asked += ("--calibration-tokens", 1000, "--held-out-tokens", 600, "--max-drop", 1000)
    asked += ("--accept-large-drop", "--accept-weak-evidence")

    told = answer("sweep", road / "moe", *tasks, *asked, "--workers", 2, "-o", report)

    assert told["output"] == str(report)
    assert json.loads((report / "report.json").read_text()) == {
        key: value for key, value in told.items() if key != "output"
    }
    # Two tasks, each with the unpruned model and 2 x 2 cuts of each task.
    assert len(told["rows"]) == 2 * (1 + 2 * 4)
    assert (report / "sweep.csv").read_text().count("\n") == 1 + len(told["rows"])
    assert (report / "times.csv").read_text().count("\n") == 1 + 8
    assert (report / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert "| code | reap | 0.5 | 4" not in (report / "report.md").read_text()
    assert "| code | reap | 0.5 | 8/16 |" in (report / "report.md").read_text()
    best = told["thresholds"]["prose"]["best"]
    assert best["keep"] == 0.5
    assert best["worst_other"]["task"] == "code"

    # The plan can be applied at once, and judging it on the report's lines gives the row again.
    pruned = tmp_path / "pruned"
    answer("apply", road / "moe", "--plan", report / best["plan"], "-o", pruned)
    for name in ("code", "prose"):
        held_out = f"{name}={report}/held-out/{name}.jsonl"
        again = answer("evaluate", pruned, "--task", held_out, "--max-tokens", 600)
        (row,) = (
            row
            for row in told["rows"]
            if row["plan"] == best["plan"] and row["judged_on"] == name
        )
        assert again["value"] == pytest.approx(row["score"], rel=1e-5)
        assert again["ci95"] == pytest.approx(row["ci95"], rel=1e-5)
        assert (again["n"], again["tokens"]) == (row["lines"], row["tokens"])
    size = answer("inspect", pruned)
    assert size["experts_per_layer"] == [4, 4]

    # The statistics are there for other methods.
    plan = tmp_path / "plan.json"
    stats = ("--stats", report / "statistics.safetensors", "--task", "prose")
    answer("prune", road / "moe", *stats, "--method", best["method"], "--keep", 0.5, "-o", plan)
    assert plan.read_bytes() == (report / best["plan"]).read_bytes()

    refused = invoke("sweep", road / "moe", *tasks, *asked, "-o", report)
    assert refused.exit_code == 1
    assert "--force" in refused.stderr


def test_the_text_names_the_plan_or_says_that_no_cut_holds(
    road: Path, tasks: list[str], invoke: Callable[..., Result], tmp_path: Path
) -> None:
    report = tmp_path / "report"
    asked: tuple[object, ...]
    asked = ("--method", "random,reap", "--keep", "0.1,0.5,1", "--seeds", 2, "--max-drop", 1000)
    asked += ("--accept-large-drop", "--accept-weak-evidence")
    asked += ("--calibration-tokens", 500, "--held-out-tokens", 400)
    result = invoke("sweep", road / "moe", tasks[0], *asked, "-o", report)
    assert result.exit_code == 0, result.stderr
    (sentence,) = (line for line in result.stdout.splitlines() if line.startswith("code: "))
    named = sentence.rpartition(": ")[2]
    assert "keeps 8 of 16 experts by" in sentence
    assert named.startswith(f"{report}/plans/code-")
    assert json.loads(Path(named).read_text())["task"] == "code"
    # A fraction below top-k is left out, and said so.
    assert "note: --keep 0.1 was left out: layer 0 must keep at least 2" in result.stdout
    rows = [line.split() for line in result.stdout.splitlines() if line.startswith("code  ")]
    assert [row[1:4] for row in rows[1:]] == [
        ["random", "1", "0"],
        ["random", "1", "1"],
        ["random", "0.5", "0"],
        ["random", "0.5", "1"],
        ["reap", "1", "0"],
        ["reap", "0.5", "0"],
    ]
    only_all: tuple[object, ...] = (
        "--method",
        "reap",
        "--keep",
        1,
        "--calibration-tokens",
        100,
    )
    only_all += ("--accept-weak-evidence",)
    result = invoke("sweep", road / "moe", tasks[0], *only_all, "-o", tmp_path / "all")
    assert "code: nothing was cut. Give --keep a smaller fraction." in result.stdout


def test_inspect_tells_what_a_report_found(
    road: Path, tasks: list[str], answer: Answer, invoke: Callable[..., Result], tmp_path: Path
) -> None:
    report = tmp_path / "report"
    asked: tuple[object, ...] = ("--method", "reap", "--keep", "0.1,0.5,0.75", "--seeds", "3,5")
    asked += ("--calibration-tokens", 500, "--held-out-tokens", 400, "--max-drop", 1000)
    asked += ("--accept-large-drop", "--accept-weak-evidence")
    swept = answer("sweep", road / "moe", tasks[0], *asked, "-o", report)

    told = answer("inspect", report)

    assert told["kind"] == "sweep report"
    assert told["methods"] == {"reap": {}}
    assert (told["keep"], told["seeds"], told["plans"]) == ([0.75, 0.5], [3, 5], 2)
    assert "at least 2" in told["left_out"]["0.1"]
    assert told["missing_plans"] == []
    plan = answer("inspect", report / told["thresholds"]["code"]["plan"])
    assert plan["sha256"] == told["thresholds"]["code"]["plan_sha256"]
    for name in ("checkpoint_sha256", "statistics_sha256"):
        assert told[name] == plan[name] == swept[name]
    assert told["tasks"]["code"]["sha256"] == swept["tasks"]["code"]["sha256"]
    best = told["thresholds"]["code"]
    assert (best["keep"], best["experts"], best["keep_by_method"]) == (0.5, 8, {"reap": 0.5})
    sizes = told["checkpoint_bytes"]
    assert sizes["deepest_cut"] == best["checkpoint_bytes"] < sizes["unpruned"]
    assert answer("inspect", report / "report.json") == told

    (report / best["plan"]).unlink()
    shown = invoke("inspect", report, "--full").stdout
    assert f"missing plans      {best['plan']}" in shown
    assert f"verdict           {swept['thresholds']['code']['sentence']}" in shown
    text = (report / "report.json").read_text()
    for content, rule in (
        (text.replace('"version": 1', '"version": 2'), "of version 1, got edgemoe.sweep 2"),
        (text.replace('"rows"', '"lines"'), "KeyError: 'rows'. Sweep again"),
        (text[:100], "must be as `edgemoe sweep` wrote it"),
        ("[]", "must be as `edgemoe sweep` wrote it"),
    ):
        (report / "report.json").write_text(content)
        refused = invoke("inspect", report)
        assert refused.exit_code == 1
        assert rule in refused.stderr


def test_bad_input_is_refused(
    road: Path,
    tasks: list[str],
    invoke: Callable[..., Result],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    short = tmp_path / "short.jsonl"
    shutil.copy(road / "code.jsonl", short)
    short.write_text("".join(short.read_text().splitlines(keepends=True)[:7]))
    same = f"--held-out=code={tasks[0].rpartition('=')[2]}"

    def refuse(*changes: object, status: int = 1, task: str = tasks[0]) -> str:
        output = tmp_path / "report"
        result = invoke("sweep", road / "moe", task, "-o", output, *changes)
        assert result.exit_code == status, result.output
        assert result.stdout == ""
        assert "Traceback" not in result.stderr
        assert [file.name for file in tmp_path.iterdir()] == ["short.jsonl"]
        return result.stderr

    assert "8 lines or more" in refuse("--method=reap", task=f"--task=code={short}")
    assert "got 1.5" in refuse("--method=reap", "--keep=0.5,1.5")
    assert "numbers with commas" in refuse("--method=reap", "--keep=half", status=2)
    assert "one seed or more" in refuse("--method=random", "--seeds=0", status=2)
    assert "none in 0.1: layer 0 must keep at least 2" in refuse("--method=reap", "--keep=0.1")
    assert "one of camera, frequency" in refuse("--method=reap,best")
    assert "METHOD:NAME=VALUE" in refuse("--method=reap", "--set=population=3")
    assert "--max-drop must be" in refuse("--method=reap", "--max-drop=-1")
    assert "24 of 24 held-out lines are calibration lines too" in refuse("--method=reap", same)
    assert "Use --workers 1" in refuse(
        *("--method=reap", "--workers=2", "--memory-limit=0.001", "--accept-weak-evidence")
    )
    assert "Missing option '--method'" in refuse(status=2)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install 'edgemoe[sweep]'" in refuse("--method=reap")
