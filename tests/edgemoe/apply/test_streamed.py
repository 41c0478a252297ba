"""A plan applied layer by layer gives the checkpoint that applying it in memory gives."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from edgemoe.apply.in_memory import apply_plan
from edgemoe.apply.streamed import apply_streamed
from edgemoe.errors import OutputError, PlanError
from edgemoe.models import load_model, read_shape, save_model
from edgemoe.models.weights.fingerprint import fingerprint_checkpoint
from edgemoe.prune import LayerPlan, MergedExpert, Plan

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

FAMILIES = ("glm4_moe", "mixtral", "qwen2_moe")
KILLED_RUNS = Path(__file__).parents[1] / "killed_runs.py"
MERGED = MergedExpert(members=(2, 3), weights=(3.0, 1.0))
UNIFORM: list[list[int | MergedExpert]] = [
    [0, 1, MERGED, 5],
    [1, 4, 5, MERGED],
    [0, 6, 7, MERGED],
]
RAGGED: list[list[int | MergedExpert]] = [[0, 1, MERGED], [*range(8)], [0, 6, 7, MERGED]]


def make_plan(path: Path, kept: Sequence[Sequence[int | MergedExpert]]) -> Plan:
    shape = read_shape(path)
    layers = tuple(
        LayerPlan(
            layer=layer.layer,
            experts=tuple(
                entry if isinstance(entry, MergedExpert) else MergedExpert(members=(entry,))
                for entry in kept[number % len(kept)]
            ),
        )
        for number, layer in enumerate(shape.layers)
    )
    sha256 = fingerprint_checkpoint(path)
    return Plan(method="frequency", layers=layers, checkpoint_sha256=sha256, task="bible")


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    files = sorted(path.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def read_bytes(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kept", [UNIFORM, RAGGED], ids=["uniform", "ragged"])
def test_the_checkpoint_is_that_of_applying_in_memory(
    make_checkpoint: Callable[..., Path],
    token_ids: torch.Tensor,
    tmp_path: Path,
    family: str,
    kept: list[list[int | MergedExpert]],
) -> None:
    path = make_checkpoint(family, dtype=torch.bfloat16, max_shard_size="30KB")
    plan = make_plan(path, kept)
    whole = tmp_path / "whole"
    whole.mkdir()
    save_model(apply_plan(load_model(path), plan), whole, source=path)

    for name, max_shard_bytes in {"many": 20_000, "again": 20_000, "one": 10**9}.items():
        apply_streamed(path, plan, tmp_path / name, max_shard_bytes=max_shard_bytes)

    expected = read_tensors(whole)
    for name in ("many", "one"):
        found = read_tensors(tmp_path / name)
        assert found.keys() == expected.keys()
        for key, tensor in found.items():
            assert tensor.dtype == expected[key].dtype or key.endswith("correction_bias"), key
            assert torch.equal(tensor.float(), expected[key].float()), key
        for file in whole.iterdir():
            if file.suffix == ".json" and "index" not in file.name:
                assert (tmp_path / name / file.name).read_bytes() == file.read_bytes()
    assert read_bytes(tmp_path / "many") == read_bytes(tmp_path / "again")
    assert all(f.stat().st_size < 30_000 for f in (tmp_path / "many").glob("*.safetensors"))
    assert {file.name for file in (tmp_path / "one").iterdir()} == {
        file.name for file in whole.iterdir()
    }
    logits = load_model(tmp_path / "many").model(token_ids).logits
    assert torch.equal(logits, load_model(whole).model(token_ids).logits)
    if kept is UNIFORM:
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / "many", dtype=torch.float32)
        torch.testing.assert_close(stock.eval()(token_ids).logits, logits)


def test_a_ragged_checkpoint_is_compressed_again(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    path = make_checkpoint("mixtral", dtype=torch.bfloat16)
    apply_streamed(path, make_plan(path, RAGGED), tmp_path / "once")

    plan = make_plan(tmp_path / "once", [[0, 1, 2]])
    apply_streamed(tmp_path / "once", plan, tmp_path / "twice")

    twice = load_model(tmp_path / "twice")
    assert twice.experts_per_layer == (3, 3, 3)
    assert not (tmp_path / "twice" / "edgemoe.json").exists()
    assert twice.provenance is not None
    assert twice.provenance["before"]["method"] == "frequency"


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0])
def test_ten_kills_change_nothing(
    make_checkpoint: Callable[..., Path], tmp_path: Path, seed: int
) -> None:
    path = make_checkpoint("qwen2_moe", num_hidden_layers=6, max_shard_size="60KB")
    plan = make_plan(path, UNIFORM)
    plan.save(tmp_path / "plan.json")
    apply_streamed(path, plan, tmp_path / "once", max_shard_bytes=40_000)
    command = ["apply", str(path), "--plan", str(tmp_path / "plan.json")]
    command += ["-o", str(tmp_path / "killed"), "--max-shard-gb", "4e-5"]

    done = subprocess.run(
        [
            sys.executable,
            str(KILLED_RUNS),
            str(seed),
            "10",
            "40",
            f"{tmp_path}/killed.partial",
            *command,
        ],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )

    assert done.returncode == 0, done.stderr
    resumed = json.loads(done.stdout.splitlines()[-1])
    assert len(resumed) == 11
    assert sum(resumed) > 5
    assert read_bytes(tmp_path / "killed") == read_bytes(tmp_path / "once")
    assert not list(tmp_path.glob("*.partial"))


def test_refusals_leave_nothing(
    make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_checkpoint("mixtral")
    other = make_checkpoint("mixtral", seed=1)
    before = sorted(tmp_path.iterdir())

    with pytest.raises(PlanError, match="made for this checkpoint"):
        apply_streamed(path, make_plan(other, UNIFORM), tmp_path / "out")
    with pytest.raises(PlanError, match="at least top_k=3"):
        apply_streamed(path, make_plan(path, [[0, 1]]), tmp_path / "out")
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: full)
    with pytest.raises(OutputError, match=r"must have .* free, got 1.0 kB"):
        apply_streamed(path, make_plan(path, UNIFORM), tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before
