"""Streamed statistics equal those of the whole model, whatever happens on the way."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import edgemoe.layerwise.replay
from edgemoe.calibrate.collect import collect
from edgemoe.calibrate.statistics import Statistics, merge
from edgemoe.calibrate.streamed import calibrate_streamed
from edgemoe.errors import OutputError
from edgemoe.models import load_model, load_tokenizer
from edgemoe.tasks import TaskFile

if TYPE_CHECKING:
    from collections.abc import Callable

FAMILIES = ("glm4_moe", "mixtral", "qwen2_moe")
KILLED_RUNS = Path(__file__).parents[1] / "killed_runs.py"


@pytest.fixture
def tasks(tmp_path: Path) -> list[TaskFile]:
    """Two tasks; one line is longer than the model's window."""
    draw = np.random.Generator(np.random.PCG64(5))
    found = []
    for name, lengths in {"one": (7, 30, 1, 90), "two": (12, 40)}.items():
        lines = [" ".join(f"w{word}" for word in draw.integers(0, 96, n)) for n in lengths]
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
        found.append(TaskFile.load(name, file))
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("limit_bytes", [0, 20_000, 1 << 28])
def test_the_bits_are_those_of_the_whole_model(
    make_checkpoint: Callable[..., Path],
    tasks: list[TaskFile],
    tmp_path: Path,
    family: str,
    limit_bytes: int,
) -> None:
    path = make_checkpoint(family, dtype=torch.bfloat16, max_shard_size="30KB")
    output = tmp_path / "statistics"

    found = calibrate_streamed(path, tasks, output, limit_bytes=limit_bytes)

    whole = collect(load_model(path), tasks, load_tokenizer(path))
    assert found.sha256 == whole.sha256
    assert Statistics.load(output).sha256 == whole.sha256
    assert not list(tmp_path.glob("*.partial"))


def test_streamed_shards_add_up(
    make_checkpoint: Callable[..., Path], tasks: list[TaskFile], tmp_path: Path
) -> None:
    path = make_checkpoint("glm4_moe")
    whole = calibrate_streamed(path, tasks, tmp_path / "whole", max_tokens=50)
    shards = [
        calibrate_streamed(path, tasks, tmp_path / f"{i}", max_tokens=50, shard=(i, 2))
        for i in range(2)
    ]

    merge(*shards).save(tmp_path / "merged")

    assert (tmp_path / "merged").read_bytes() == (tmp_path / "whole").read_bytes()
    assert whole.tasks.keys() == {"one", "two"}


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0])
def test_ten_kills_change_nothing(
    make_checkpoint: Callable[..., Path], tasks: list[TaskFile], tmp_path: Path, seed: int
) -> None:
    path = make_checkpoint("qwen2_moe", num_hidden_layers=6, max_shard_size="60KB")
    given = [f"--task={task.name}={tmp_path / task.name}.jsonl" for task in tasks]
    command = ["calibrate", str(path), *given, "-o", str(tmp_path / "statistics")]

    done = subprocess.run(
        [
            sys.executable,
            str(KILLED_RUNS),
            str(seed),
            "10",
            "30",
            f"{command[-1]}.partial",
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
    again = tmp_path / "again"
    command[-1] = str(again)
    subprocess.run(
        [sys.executable, str(KILLED_RUNS), "0", "0", "1", f"{again}.partial", *command],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )
    assert again.read_bytes() == (tmp_path / "statistics").read_bytes()
    assert not list(tmp_path.glob("*.partial"))


def test_finished_layers_are_not_run_again_and_other_work_is_refused(
    make_checkpoint: Callable[..., Path],
    tasks: list[TaskFile],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = make_checkpoint("mixtral", num_hidden_layers=4)
    output = tmp_path / "statistics"
    interrupted = True
    ran: list[int] = []
    own = edgemoe.layerwise.replay.only_layer

    def count(decoder: Any, layers: Any, index: int) -> Any:
        if interrupted and index == 2:
            raise KeyboardInterrupt
        ran.append(index)
        return own(decoder, layers, index)

    monkeypatch.setattr("edgemoe.layerwise.runner.only_layer", count)
    with pytest.raises(KeyboardInterrupt, match="the same command goes on"):
        calibrate_streamed(path, tasks, output)
    assert ran == [0, 1]
    with pytest.raises(OutputError, match=r"got .*partial with another options"):
        calibrate_streamed(path, tasks, output, max_tokens=3)
    kept = tmp_path / "kept"
    shutil.copytree(tmp_path / "statistics.partial", kept)

    interrupted = False
    resumed = calibrate_streamed(path, tasks, output)

    assert ran == [0, 1, 2, 3]
    assert resumed.sha256 == collect(load_model(path), tasks, load_tokenizer(path)).sha256
    kept.rename(tmp_path / "statistics.partial")
    forced = calibrate_streamed(path, tasks, output, max_tokens=3, force=True)
    assert forced.task("one").tokens == 3
    assert not list(tmp_path.glob("*.partial"))
