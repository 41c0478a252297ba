"""Trainings that are killed, at moments that a process cannot prepare for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from edgemoe.tasks import TaskFile

KILLED_RUNS = Path(__file__).parents[1] / "killed_runs.py"
KILLS = 5


def read_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
def test_kills_change_nothing(compressed: Any, task: TaskFile, tmp_path: Path) -> None:
    whole, small = compressed("glm4_moe", kind="ragged")
    command = ["recover", str(small), "--teacher", str(whole), "--method", "lora+router-kd"]
    command += ["--task", f"t={task.path}", "--steps", "6", "--batch-tokens", "64"]
    command += ["--learning-rate", "3e-3", "--threads", "1"]

    for kills, name in ((KILLS, "killed"), (0, "once")):
        work = tmp_path / f"{name}.partial"
        arguments = [str(x) for x in (KILLED_RUNS, 0, kills, 70, work)]
        done = subprocess.run(
            [sys.executable, *arguments, *command, "-o", str(tmp_path / name)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
        resumed = json.loads(done.stdout.splitlines()[-1])
        assert len(resumed) == kills + 1
        if kills:
            assert sum(resumed) >= 2

    assert read_bytes(tmp_path / "killed") == read_bytes(tmp_path / "once")
    assert not list(tmp_path.glob("*.partial"))
