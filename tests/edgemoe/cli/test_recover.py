"""``edgemoe recover`` on what the commands before it made."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest
import torch
from safetensors.torch import load_file

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from click.testing import Result

Answer: TypeAlias = "Callable[..., dict[str, Any]]"
QUICK = ("--steps=8", "--batch-tokens=256", "--held-out=0.25", "--threads=1")


@pytest.fixture(scope="module")
def pruned(road: Path, answer: Answer) -> Path:
    folder = road / "for-recovery"
    stats, plan = folder / "stats.safetensors", folder / "plan.json"
    folder.mkdir()
    answer("calibrate", road / "moe", f"--task=code={road}/code.jsonl", "-o", stats)
    asked = ("--task=code", "--method=uncurl", "--keep=0.5")
    answer("prune", road / "moe", "--stats", stats, *asked, "-o", plan)
    answer("apply", road / "moe", "--plan", plan, "-o", folder / "pruned")
    return folder / "pruned"


@pytest.mark.parametrize(
    ("method", "rate"), [("lora+router-kd", "3e-3"), ("lora", "3e-3"), ("uncurl", "1e-2")]
)
def test_a_merged_model_is_recovered_judged_and_inspected(
    road: Path, pruned: Path, answer: Answer, tmp_path: Path, method: str, rate: str
) -> None:
    tasks = [f"--task={name}={road}/{name}.jsonl" for name in ("code", "prose")]
    teacher = ["--teacher", road / "moe"] if "kd" in method else []
    out = tmp_path / "out"
    asked = ("--method", method, "--learning-rate", rate, *teacher, *QUICK)

    told = answer("recover", pruned, *tasks, *asked, "-o", out)

    assert told["output"] == str(out)
    assert told["method"] == method
    assert told["experts_per_layer"] == [4, 4]
    assert told["improved"] == (told["best_step"] > 0)
    assert told["loss_after"] < told["loss_before"] or not told["improved"]
    if method != "uncurl":
        assert told["improved"]
    assert told["tasks"].keys() == {"code", "prose"}
    code = told["tasks"]["code"]
    assert code["held_out_lines"] == 3
    assert (code["divergence_after"] is None) == (not teacher)
    held_out = tmp_path / "held-out.jsonl"
    lines = (road / "code.jsonl").read_text().splitlines(keepends=True)
    held_out.write_text("".join(lines[3::4]))
    # They chose the step: this compares two ways to score them.
    judged = answer("evaluate", out, f"--task=code={held_out}", "--calibration-lines", "warn")
    assert judged["value"] == pytest.approx(code["perplexity_after"], rel=1e-4)
    described = answer("inspect", out)
    assert described["experts_per_layer"] == [4, 4]
    assert described["provenance"]["method"] == method
    assert described["provenance"]["before"]["method"] == "uncurl"


def test_a_person_is_told_what_was_won_or_that_nothing_was(
    road: Path, pruned: Path, invoke: Callable[..., Result], tmp_path: Path
) -> None:
    common = ("recover", pruned, f"--task=code={road}/code.jsonl", *QUICK)
    kd = ("--method=router-kd", "--teacher", road / "moe")

    won = invoke(*common, *kd, "--learning-rate=1e-3", "-o", tmp_path / "won")
    lost = invoke(*common, *kd, "--learning-rate=1", "-o", tmp_path / "lost")

    assert won.exit_code == 0, won.stderr
    assert "router-kd, best after step" in won.stdout
    assert ", perplexity code " in won.stdout
    assert lost.exit_code == 0, lost.stderr
    assert f"{tmp_path}/lost: {pruned} as it is, because no step of router-kd" in lost.stdout
    before, after = (load_file(x / "model.safetensors") for x in (pruned, tmp_path / "lost"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_is_wrong_is_one_message_and_leaves_nothing(
    road: Path, pruned: Path, invoke: Callable[..., Result], tmp_path: Path
) -> None:
    def refuse(message: str, *arguments: object, status: int = 1) -> None:
        task = f"--task=code={road}/code.jsonl"
        told = invoke("recover", pruned, task, *arguments, "-o", tmp_path / "out")
        assert told.exit_code == status
        assert message in told.stderr
        assert "Traceback" not in told.stderr
        assert not list(tmp_path.iterdir())

    refuse("router-kd must have a teacher, got none", "--method=router-kd")
    refuse("the method must be one of least-squares, lora, ", "--method=distil")
    refuse("steps must be in [1, inf), got 0.", "--method=lora", "--steps=0")
    refuse("held_out_fraction must be in (0, 0.5]", "--method=lora", "--held-out=1")
    refuse("a device must be cpu", "--method=lora", "--device=tpu")
    refuse("Missing option '--method'", status=2)
    refuse("checkpoint must be a directory", "--method=lora", "--teacher", tmp_path / "none")


def test_json_is_json_where_nothing_was_won(
    road: Path, pruned: Path, answer: Answer, tmp_path: Path
) -> None:
    told = answer(
        "recover",
        pruned,
        f"--task=code={road}/code.jsonl",
        "--method=router-kd",
        "--teacher",
        road / "moe",
        "--learning-rate=1",
        "-o",
        tmp_path / "out",
        *QUICK,
    )

    assert (told["improved"], told["best_step"]) == (False, 0)
    assert told["loss_after"] == told["loss_before"]
    assert json.loads((tmp_path / "out/config.json").read_text())["edgemoe"]["provenance"]
