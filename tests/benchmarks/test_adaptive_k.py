"""The benchmarks of adaptive k on a tiny random model."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click
import pytest
from click.testing import CliRunner

from benchmarks.adaptive_k import ablation, harder_tasks, places, policies, who_gets_more
from benchmarks.wide_model import write_wide_model
from edgemoe.models import read_shape
from edgemoe.models.tiny import write_tiny_checkpoint

if TYPE_CHECKING:
    from pathlib import Path


def test_policies_are_judged_once_and_told_apart(tmp_path: Path) -> None:
    write_tiny_checkpoint("qwen3_moe", tmp_path / "moe", num_experts_per_tok=4)
    for part, shift in (("train", 0), ("test", 5)):
        lines = [
            {"text": " ".join(f"w{3 + (n * m + shift) % 90}" for m in range(1, 40))}
            for n in range(20)
        ]
        path = tmp_path / f"code.{part}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    common: tuple[object, ...] = ("--tasks", tmp_path, "--task", "code")
    common = (*common, "--work", tmp_path / "work")
    common = (*common, "--mean-k", 3, "--tokens", 300, "--held-out-tokens", 200)

    def run(script: click.Command, *more: object) -> str:
        words = [str(word) for word in (tmp_path / "moe", *common, *more)]
        result = CliRunner().invoke(script, words, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    asked = ("--policy", "fixed", "--policy", "ada-k:steps=1")
    table = run(policies.main, *asked)
    assert "| `fixed` | 3.00 |" in table
    kept = {path.name for path in (tmp_path / "work").glob("*.json")}
    assert kept == {
        "code-top-k-None.json",
        "code-fixed-3.0.json",
        "code-ada-k-3.0-steps=1.json",
    }
    assert run(policies.main, *asked, "--data", tmp_path / "curves.csv") == table
    curves = (tmp_path / "curves.csv").read_text("utf-8").splitlines()
    assert [line.split(",")[:4] for line in curves[:2]] == [
        ["task", "policy", "asked", "used"],
        ["code", "fixed", "3", "3.0000"],
    ]
    assert len(curves) == 3
    assert "steps=1" in run(ablation.main, "--variant", "steps=1")
    told = run(who_gets_more.main, "--data", tmp_path / "a.csv", "--policy", "ada-k:steps=1")
    assert "| `ada-k:steps=1` | code |" in told
    layers = (tmp_path / "a.csv").read_text("utf-8").splitlines()
    assert layers[1].startswith("ada-k:steps=1,code,0,")
    assert len(layers) == 5
    assert {path.name for path in (tmp_path / "work").glob("*.json")} == kept
    row = run(harder_tasks.main, "--policy", "top-p").splitlines()[-1]
    numbers = [float(cell) for cell in row.split("|")[3:7]]
    assert all(1 <= number <= 4 for number in numbers)
    assert min(numbers[1:]) - 0.1 <= numbers[0] <= max(numbers[1:]) + 0.1


@pytest.mark.slow
def test_prompts_have_fewer_rows_with_fewer_experts(tmp_path: Path) -> None:
    write_tiny_checkpoint("qwen3_moe", tmp_path / "moe", num_experts_per_tok=4)
    lines = [
        {"text": " ".join(f"w{3 + (n * m) % 90}" for m in range(1, 60))} for n in range(1, 30)
    ]
    path = tmp_path / "code.test.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = ("--tasks", tmp_path, "--task", "code", "--work", tmp_path / "work", "--pieces", 1)
    words = [str(word) for word in (tmp_path / "moe", *asked)]
    result = CliRunner().invoke(places.main, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    rows = [row.split("|") for row in result.stdout.splitlines() if row.startswith("| ")][1:]
    shares = [float(row[2]) for row in rows]
    assert [int(row[1]) for row in rows] == [1, 2, 3, 4]
    # Of eight experts no busiest one has less than an eighth of the slots.
    assert all(cap / 8 <= share <= 1 for cap, share in enumerate(shares, 1))
    assert shares == sorted(shares)


def test_the_wide_model_has_as_many_experts_as_benchmarks_say(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "moe_intermediate_size": 32}
    model, _ = write_wide_model(tmp_path, **sizes)
    assert read_shape(model).experts_per_layer == (16,)
    write_tiny_checkpoint("qwen3_moe", tmp_path / "other" / "wide", num_hidden_layers=1)
    with pytest.raises(click.ClickException, match=r"16 experts per layer, got \{8\}"):
        write_wide_model(tmp_path / "other")


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (" the", "begins a word"),
        ("ing", "goes on in a word"),
        (" 42", "number"),
        ("():", "punctuation"),
        ("\n\n  ", "white space"),
        (" x1", "begins a word"),
    ],
)
def test_tokens_have_a_kind(text: str, kind: str) -> None:
    assert who_gets_more.kind_of(text) == kind
