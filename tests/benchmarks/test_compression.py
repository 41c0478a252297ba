"""What the benchmarks of compression share: commands that run once, scores that are kept."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click
import pytest
import torch
from click.testing import CliRunner

from benchmarks import commands
from benchmarks.commands import Commands
from benchmarks.compression import constants, layer_error
from benchmarks.tables import show_drop
from edgemoe.calibrate.collect import collect
from edgemoe.calibrate.sample import Window
from edgemoe.evaluate.evaluation import evaluate
from edgemoe.evaluate.torch_scorer import TorchScorer
from edgemoe.models import load_model, load_tokenizer
from edgemoe.models.tiny import write_tiny_checkpoint
from edgemoe.plans.keep_all import keep_all
from edgemoe.plans.plan import LayerPlan, MergedExpert, Plan
from edgemoe.tasks import TaskFile

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.set_num_threads(1)
    write_tiny_checkpoint("qwen3_moe", tmp_path / "moe", num_hidden_layers=2)
    rows = [{"text": " ".join(f"w{3 + (n * m) % 90}" for m in range(1, 30))} for n in range(12)]
    (tmp_path / "t.test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "moe"


@pytest.mark.slow
def test_a_command_runs_once_and_a_killed_one_again(model: Path, tmp_path: Path) -> None:
    lines = tmp_path / "t.test.jsonl"
    work = tmp_path / "work"
    asked = ("calibrate", model, "--task", f"t={lines}", "--max-tokens", 100)
    first = Commands(work, threads=1)
    done = first.make("stats", *asked)
    assert done.answer["output"] == str(work / "stats")
    # torch alone is larger than this, and nothing here takes a minute.
    assert 100e6 < done.peak_bytes < 8e9
    assert 0.5 < done.cpu_seconds < 60
    written = (work / "stats").stat().st_mtime_ns
    assert Commands(work, threads=1).make("stats", *asked) == done
    assert (work / "stats").stat().st_mtime_ns == written
    with pytest.raises(click.ClickException, match="must be of the same command"):
        first.make("stats", *asked[:-1], 50)
    # The output is there and the answer is not: it ended before it was done.
    (work / "answers/stats.json").unlink()
    assert first.make("stats", *asked).answer == done.answer
    assert (work / "stats").stat().st_mtime_ns > written
    write_tiny_checkpoint("qwen3_moe", tmp_path / "other", num_hidden_layers=1)
    stats = ("--stats", work / "stats", "--task", "t", "--method", "reap", "--keep", 0.5)
    with pytest.raises(click.ClickException, match="must be of the checkpoint"):
        first.make("plan", "prune", tmp_path / "other", *stats)
    assert not (work / "answers/plan.json").exists()


def test_a_score_is_that_of_evaluate_and_is_kept(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = tmp_path / "t.test.jsonl"
    made = Commands(tmp_path / "work", threads=1)
    score = made.judge("whole", model, lines, 200)
    task = TaskFile.load("t", lines)
    scorer, tokenizer = TorchScorer(load_model(model)), load_tokenizer(model)
    assert score == evaluate(scorer, task, tokenizer, max_tokens=200)
    monkeypatch.setattr(commands, "evaluate", None)
    assert made.judge("whole", model, lines, 200) == score
    assert show_drop(score, score).startswith("+0.0% [")


def test_searches_are_measured_against_the_smallest_error(model: Path, tmp_path: Path) -> None:
    task = TaskFile.load("t", tmp_path / "t.test.jsonl")
    statistics = collect(load_model(model), [task], load_tokenizer(model), max_tokens=200)
    statistics.save(tmp_path / "stats")
    arguments = [str(model), "--stats", str(tmp_path / "stats"), "--task", "t"]
    arguments += ["--keep-experts", "4", "--every", "1"]
    result = CliRunner().invoke(layer_error.main, arguments)
    assert result.exit_code == 0, result.output
    rows = [line.split(" | ") for line in result.stdout.splitlines()[2:]]
    found = {row[0].strip("| "): row[1:] for row in rows}
    assert found["exhaustive (naee)"][:4] == ["1.0000", "1.0000", "100%", "70"]
    assert all(float(row[0]) >= 1 for row in found.values())
    # Seventy sets of four of eight, of which chance finds one in seventy.
    assert found["genetic search (moe-i2)"][2] == "100%"
    assert float(found["random"][0]) > float(found["greedy"][0])


def test_constants_answer_for_the_experts_that_are_gone(model: Path) -> None:
    opened = load_model(model)
    layer = opened.layers[0]
    whole = keep_all(opened.shape)
    gone = LayerPlan(
        layer=layer.index,
        experts=tuple(MergedExpert(members=(expert,)) for expert in range(1, 8)),
    )
    plan = Plan(method="mone", layers=(gone, *whole.layers[1:]))
    windows = [Window(line=0, start=0, ids=list(range(3, 40)))]
    moments = constants.measure(opened, windows)
    torch.manual_seed(0)
    hidden = torch.randn(5, opened.shape.hidden_size)
    indices = torch.tensor([[0, 1], [2, 3], [4, 0], [1, 7], [0, 5]])
    weights = torch.rand(5, 2)
    with torch.no_grad():
        before = layer.experts(hidden, indices, weights)
        with constants.replaced(opened, whole, moments):
            assert torch.equal(layer.experts(hidden, indices, weights), before)
        with constants.replaced(opened, plan, moments):
            found = layer.experts(hidden, indices, weights)
        assert torch.equal(layer.experts(hidden, indices, weights), before)
        expected = before.clone()
        for token, slot in ((0, 0), (2, 1), (4, 0)):
            own = layer.expert_output(0, hidden[token : token + 1])[0]
            mean = moments[layer.index].means[0].float()
            expected[token] += weights[token, slot] * (mean - own)
    torch.testing.assert_close(found, expected)
    assert moments[layer.index].means[0].abs().sum() > 0
