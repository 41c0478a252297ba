"""``edgemoe decompose`` on the way from statistics to a bundle."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest
import torch

from edgemoe.models.tiny import write_tiny_checkpoint
from edgemoe.plans.plan import Plan

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from click.testing import Result

# Lines that chose the experts are judged here: scores are compared, not believed.
READ = "--calibration-lines=warn"

Answer: TypeAlias = "Callable[..., dict[str, Any]]"


@pytest.fixture(scope="module", params=["qwen3_moe", "gpt_oss"])
def made(
    request: pytest.FixtureRequest, answer: Answer, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with a checkpoint, a task, its statistics and a plan of three quarters."""
    folder = tmp_path_factory.mktemp(request.param)
    write_tiny_checkpoint(request.param, folder / "moe", dtype=torch.bfloat16)
    rows = [" ".join(f"w{(7 * line + 5 * n * n) % 96}" for n in range(40)) for line in range(6)]
    text = "".join(json.dumps({"text": row}) + "\n" for row in rows)
    (folder / "t.jsonl").write_text(text)
    answer("calibrate", folder / "moe", f"--task=t={folder}/t.jsonl", "-o", folder / "stats")
    asked = ("--stats", folder / "stats", "--task", "t", "--method", "reap", "--keep", 0.75)
    answer("prune", folder / "moe", *asked, "-o", folder / "pruned.json")
    return folder


def asked(folder: Path, method: str, ratio: float = 0.6) -> tuple[object, ...]:
    task = ("--stats", folder / "stats", "--task", "t")
    return ("decompose", folder / "moe", *task, "--method", method, "--param-ratio", ratio)


@pytest.mark.parametrize("method", ["svd", "svd-whitened"])
def test_a_pruned_model_is_factored_and_judged(
    made: Path, answer: Answer, tmp_path: Path, method: str
) -> None:
    plan = tmp_path / "plan.json"

    told = answer(*asked(made, method), "--plan", made / "pruned.json", "-o", plan)
    applied = answer("apply", made / "moe", "--plan", plan, "-o", tmp_path / "small")

    assert told["experts_per_layer"] == [6] * 4
    assert 0.58 < told["param_ratio_reached"] <= told["param_ratio"] == 0.6
    parameters = told["expert_parameters_after"] / told["expert_parameters_before"]
    assert parameters == told["param_ratio_reached"]
    assert applied["ranks_per_layer"] == told["ranks_per_layer"]
    before, after = (answer("inspect", path) for path in (plan, tmp_path / "small"))
    assert before["method"] == after["provenance"]["method"] == "reap"
    assert before["factors"] == after["provenance"]["factors"]
    assert before["factors"]["method"] == method
    assert before["factors"]["sample_tokens"] == (240 if method == "svd-whitened" else 0)
    for described in (before, after):
        pairs = zip(described["up_ranks"], described["down_ranks"], strict=True)
        assert [list(pair) for pair in pairs] == told["ranks_per_layer"]
    whole = answer("inspect", made / "moe")["parameters"]
    assert after["parameters"] < whole
    score = answer("evaluate", tmp_path / "small", f"--task=t={made}/t.jsonl", READ)
    assert score["tokens"] > 0


@pytest.mark.slow
@pytest.mark.fused
def test_experts_between_shared_bases_are_judged_and_exported(
    made: Path, answer: Answer, tmp_path: Path
) -> None:
    plan = tmp_path / "plan.json"
    options = ("--set", "multiple=8", "--set", "tokens=200")

    told = answer(
        *asked(made, "shared-basis"), *options, "--plan", made / "pruned.json", "-o", plan
    )
    answer("apply", made / "moe", "--plan", plan, "-o", tmp_path / "small")
    target = ("--target", "cpu", "--precision", "fp32")
    answer("export", tmp_path / "small", *target, "-o", tmp_path / "bundle")

    assert 0.4 < told["param_ratio_reached"] <= 0.6
    (rank,) = {rank for pair in told["ranks_per_layer"] for rank in pair}
    assert rank % 8 == 0
    described = answer("inspect", tmp_path / "small")
    assert described["basis_per_layer"] == [rank] * 4
    assert described["provenance"]["factors"]["method"] == "shared-basis"
    task = f"--task=t={made}/t.jsonl"
    exported = answer("evaluate", tmp_path / "bundle", task, READ)
    eager = answer("evaluate", tmp_path / "small", task, READ)
    assert exported["value"] == pytest.approx(eager["value"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.fused
def test_a_factored_model_is_exported(made: Path, answer: Answer, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    answer(*asked(made, "svd-whitened"), "-o", plan, "--set", "tokens=100")
    answer("apply", made / "moe", "--plan", plan, "-o", tmp_path / "small")
    target = ("--target", "cpu", "--precision", "fp32")

    answer("export", tmp_path / "small", *target, "-o", tmp_path / "bundle")

    task = f"--task=t={made}/t.jsonl"
    exported = answer("evaluate", tmp_path / "bundle", task, READ)
    eager = answer("evaluate", tmp_path / "small", task, READ)
    assert exported["value"] == pytest.approx(eager["value"], rel=1e-4)


def test_the_same_call_gives_the_same_bytes_and_a_text(
    made: Path, invoke: Callable[..., Result], tmp_path: Path
) -> None:
    options = ("--set", "importance=reap", "--set", "layers=loss", "--set", "multiple=1")
    for name in ("one", "other"):
        done = invoke(*asked(made, "svd-whitened"), *options, "-o", tmp_path / name)
        assert done.exit_code == 0, done.stderr
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()
    first, second, third = done.stdout.splitlines()
    assert first == f"{tmp_path / 'other'}: svd-whitened for t"
    assert "before" in second
    assert second.endswith(", 0.6 asked")
    assert third.startswith("ranks per layer, up + down: ")
    ranks = [layer.ranks for layer in Plan.load(tmp_path / "one").layers]
    assert all(pairs is not None and len(set(pairs)) > 1 for pairs in ranks)
    shown = invoke("inspect", tmp_path / "one", "--full").stdout
    assert "up ranks" in shown
    assert "sample sha256" in shown


def test_refusals_leave_nothing(
    made: Path, invoke: Callable[..., Result], answer: Answer, tmp_path: Path
) -> None:
    plan = made / "factored.json"
    if not plan.exists():
        answer(*asked(made, "svd"), "-o", plan)
        answer("apply", made / "moe", "--plan", plan, "-o", made / "factored")
        task = f"--task=t={made}/t.jsonl"
        answer("calibrate", made / "factored", task, "-o", made / "factored-stats")
    output = ("-o", tmp_path / "out")
    other = ("--stats", made / "factored-stats", "--task", "t", "--method", "svd")
    factored = ("decompose", made / "factored", *other, "--param-ratio", 0.5)
    export = ("export", made / "moe", "--target", "tensorrt", "--plan", f"t={plan}")
    for command, message in (
        ((*asked(made, "svdd"), *output), "must be one of shared-basis, svd, svd-whitened"),
        ((*asked(made, "svd", 1.1), *output), "--param-ratio must be the fraction"),
        ((*asked(made, "svd", 0.001), *output), "--param-ratio must be in [0."),
        ((*asked(made, "svd"), "--set", "rank=3", *output), "defaults: importance=uniform"),
        ((*asked(made, "svd"), "--plan", plan, *output), "must have no ranks to be given some"),
        ((*asked(made, "svd"), "-o", plan), "must not exist"),
        ((*factored, *output), "experts must be whole to be factored"),
        ((*factored, "--plan", made / "pruned.json", *output), "made for this checkpoint"),
        ((*asked(made, "svd")[:5], "u", *asked(made, "svd")[6:], *output), "must be one of"),
        ((*export, *output), "must only keep and merge experts, got one that also factors"),
    ):
        done = invoke(*command)

        assert done.exit_code == 1, done.output
        assert message in done.stderr
        assert "Traceback" not in done.stderr
        assert list(tmp_path.iterdir()) == []
