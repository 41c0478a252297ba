"""A command reads what describes its checkpoint once."""

from __future__ import annotations

import collections
import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest

from edgemoe.apply.streamed import apply_streamed
from edgemoe.models.checkpoint import load_model
from edgemoe.models.tiny import write_tiny_checkpoint
from edgemoe.plans.plan import LayerPlan, MergedExpert, Plan

if TYPE_CHECKING:
    from pathlib import Path

# An audit hook cannot be removed: it lives in a process of its own.
COUNT = """
import json, os, sys
folder, *command = sys.argv[1:]
opened = []
def note(event, given):
    if event == "open" and isinstance(given[0], (str, os.PathLike)):
        path = os.path.abspath(given[0])
        if os.path.dirname(path) == folder:
            opened.append(os.path.basename(path))
sys.addaudithook(note)
from edgemoe.cli import main
try:
    main(command)
except SystemExit as ended:
    assert not ended.code, ended.code
print(json.dumps(opened))
"""


@pytest.fixture(scope="module")
def ragged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose layers have different numbers of experts: it has edgemoe.json."""
    folder = tmp_path_factory.mktemp("reads")
    whole = write_tiny_checkpoint("mixtral", folder / "whole")
    model = load_model(whole)
    layers = tuple(
        LayerPlan(
            layer=layer.index,
            experts=tuple(MergedExpert(members=(expert,)) for expert in range(5 + number % 2)),
        )
        for number, layer in enumerate(model.layers)
    )
    plan = Plan(method="by hand", layers=layers, checkpoint_sha256=model.sha256, task="t")
    apply_streamed(whole, plan, folder / "ragged")
    assert (folder / "ragged" / "edgemoe.json").exists()
    return folder / "ragged"


def write_task(path: Path) -> Path:
    draw = np.random.Generator(np.random.PCG64(5))
    lines = [" ".join(f"w{word}" for word in draw.integers(0, 96, 20)) for _ in range(16)]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


def write_plan(checkpoint: Path, path: Path) -> Path:
    model = load_model(checkpoint)
    layers = tuple(
        LayerPlan(
            layer=layer.index,
            experts=tuple(MergedExpert(members=(expert,)) for expert in range(4)),
        )
        for layer in model.layers
    )
    Plan(method="by hand", layers=layers, checkpoint_sha256=model.sha256).save(path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("command", ["calibrate", "apply", "export", "export streamed"])
def test_config_and_note_are_read_once(ragged: Path, tmp_path: Path, command: str) -> None:
    plan = write_plan(ragged, tmp_path / "plan.json")
    given = {
        "calibrate": ["calibrate", "--task", f"t={write_task(tmp_path / 'task')}"],
        "apply": ["apply", "--plan", str(plan)],
        "export": ["export", "--plan", f"t={plan}", "--target", "cpu", "--precision", "fp32"],
    }
    given["export streamed"] = [*given["export"], "--memory-limit", "0"]
    name, *options = given[command]

    command_line = [name, str(ragged), *options, "-o", str(tmp_path / "out")]

    done = subprocess.run(
        [sys.executable, "-c", COUNT, str(ragged), *command_line],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )

    assert done.returncode == 0, done.stderr
    opened = collections.Counter(json.loads(done.stdout.splitlines()[-1]))
    assert (opened["config.json"], opened["edgemoe.json"]) == (1, 1), opened
