"""Commands with plans that choose neurons: prune, apply, evaluate, export, verify, sweep."""

from __future__ import annotations

import csv
import json
import math
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest
from transformers import AutoModelForCausalLM

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from click.testing import Result

# Lines that chose the experts are judged here: scores are compared, not believed.
READ = "--calibration-lines=warn"

Answer: TypeAlias = "Callable[..., dict[str, Any]]"
Invoke: TypeAlias = "Callable[..., Result]"


@pytest.fixture(scope="module")
def statistics(road: Path, answer: Answer) -> Path:
    path = road / "width-stats.safetensors"
    tasks = [f"--task={name}={road / name}.jsonl" for name in ("code", "prose")]
    answer("calibrate", road / "moe", *tasks, "-o", path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "keep", "widths"), [("camera", 0.5, [16, 16]), ("heapr", 0.65, None)]
)
def test_from_prune_to_verify(
    method: str,
    keep: float,
    widths: list[int] | None,
    road: Path,
    statistics: Path,
    answer: Answer,
    tmp_path: Path,
) -> None:
    plan, small, bundle = tmp_path / "plan.json", tmp_path / "small", tmp_path / "bundle"
    asked = ("--task", "code", "--method", method, "--keep", keep)
    told = answer("prune", road / "moe", "--stats", statistics, *asked, "-o", plan)
    found = told["widths_per_layer"]
    assert found == widths or (widths is None and sum(found) <= keep * 64)
    assert told["widths_before"] == [32, 32]
    assert told["experts_per_layer"] == told["experts_before"] == [8, 8]
    kept = answer("inspect", plan)["most_neurons_per_layer"]
    assert [n or 32 for n in kept] == found

    told = answer("apply", road / "moe", "--plan", plan, "-o", small)
    assert told["widths_per_layer"] == found
    task = f"--task=code={road / 'code'}.jsonl"
    score = answer("evaluate", small, task, READ)["value"]
    again = tmp_path / "again.safetensors"
    answer("calibrate", small, task, "-o", again)
    teach = ("--method", "lora+router-kd", "--teacher", road / "moe", "--steps=2")
    quick = ("--batch-tokens=256", "--held-out=0.25", "--threads=1")
    answer("recover", small, task, *teach, *quick, "-o", tmp_path / "recovered")
    for path in (small, tmp_path / "recovered"):
        told = answer("inspect", path)
        assert told.get("widths_per_layer", [told["expert_intermediate_size"]] * 2) == found

    answer("export", small, "--target", "cpu", "--precision", "fp32", "-o", bundle)
    assert answer("verify", bundle)
    again = answer("evaluate", bundle, task, READ)["value"]
    assert math.isclose(again, score, rel_tol=1e-4)
    planned = tmp_path / "planned"
    arguments = ("--plan", f"code={plan}", "--target", "cpu", "--precision", "fp32")
    answer("export", road / "moe", *arguments, "-o", planned)
    assert answer("verify", planned)
    assert math.isclose(answer("evaluate", planned, task, READ)["value"], score, rel_tol=1e-4)


def test_where_the_entry_is_the_routed_experts_own_transformers_opens_it(
    road: Path, statistics: Path, answer: Answer, tmp_path: Path
) -> None:
    config = json.loads((road / "moe" / "config.json").read_text())
    plain = not config.get("n_shared_experts")
    plan, small = tmp_path / "plan.json", tmp_path / "small"
    asked = ("--task", "code", "--method", "camera", "--keep", 0.5, "--set", "tokens=100")
    answer("prune", road / "moe", "--stats", statistics, *asked, "-o", plan)
    answer("apply", road / "moe", "--plan", plan, "-o", small)
    assert (small / "edgemoe.json").exists() != plain
    if plain:
        model = AutoModelForCausalLM.from_pretrained(small)
        assert model.config.moe_intermediate_size == 16


def test_export_chooses_neurons_itself(road: Path, answer: Answer, tmp_path: Path) -> None:
    told = answer(
        "export", road / "moe", f"--task=code={road / 'code'}.jsonl", "--method", "camera",
        "--keep", 0.5, "--target", "cpu", "-o", tmp_path / "bundle",
    )  # fmt: skip
    assert answer("verify", tmp_path / "bundle")
    assert told


def test_a_sweep_counts_the_parameters_that_are_kept(
    road: Path, answer: Answer, invoke: Invoke, tmp_path: Path
) -> None:
    task = f"--task=code={road / 'code'}.jsonl"
    told = invoke(
        "sweep", road / "moe", task, "--method", "camera,reap", "--keep", "0.5,0.25",
        "--max-drop", 100, "--accept-large-drop", "--accept-weak-evidence",
        "-o", tmp_path / "sweep",
    )  # fmt: skip
    assert told.exit_code == 0, told.stderr
    with (tmp_path / "sweep" / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = {(row["method"], row["keep"]): row for row in rows}
    for keep in ("0.5", "0.25"):
        assert float(found["camera", keep]["kept_fraction"]) == float(keep)
        assert found["camera", keep]["experts"] == "16"
    sizes = [int(found["camera", keep]["checkpoint_bytes"]) for keep in ("0.5", "0.25")]
    assert sizes[0] > sizes[1]
    # As many routed parameters, and the router's rows of all experts.
    assert sizes[0] > int(found["reap", "0.5"]["checkpoint_bytes"])
    assert "16/16 at 50%" in (tmp_path / "sweep" / "report.md").read_text()


def test_what_cannot_be_asked_is_refused(
    road: Path, statistics: Path, invoke: Invoke, tmp_path: Path
) -> None:
    start = ("prune", road / "moe", "--stats", statistics, "--task", "code")
    end = ("-o", tmp_path / "plan.json")
    for arguments, rule in (
        (("--method", "camera", "--keep-experts", 4), "camera must be told a fraction of the"),
        (("--method", "heapr", "--keep", 0.2), "--keep must leave 8 neurons in every expert"),
        (("--method", "camera", "--keep", 2), "--keep must be a fraction of the neurons in"),
        (("--method", "camera", "--keep", 0.5, "--set", "widths=x"), "widths must be equal or"),
    ):
        told = invoke(*start, *arguments, *end)
        assert told.exit_code == 1
        assert rule in told.stderr
        assert not (tmp_path / "plan.json").exists()
    assert invoke(*start, "--method", "camera", "--keep", 0.5, *end).exit_code == 0
    decomposed = invoke(
        "decompose", road / "moe", "--plan", tmp_path / "plan.json", "--stats", statistics,
        "--task", "code", "--method", "svd", "--param-ratio", 0.5, "-o", tmp_path / "ranks",
    )  # fmt: skip
    assert decomposed.exit_code == 1
    assert "a plan must keep all neurons of its experts to be given ranks" in decomposed.stderr
