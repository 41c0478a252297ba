"""What goes wrong is an exception of edgemoe.errors, and nothing is left half-done."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from click.testing import CliRunner

import edgemoe
from edgemoe.api.carve import carve
from edgemoe.api.merge_statistics import merge_statistics
from edgemoe.cli import main
from edgemoe.errors import (
    ArgumentError,
    CarveError,
    MissingDependencyError,
    OutputError,
    PlanError,
    StatisticsError,
    StreamingError,
    TaskFileError,
)
from edgemoe.models.tiny import write_tiny_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from edgemoe import Statistics


@pytest.fixture(scope="module")
def statistics(folder: Path) -> Statistics:
    return edgemoe.calibrate(folder / "moe", {"code": folder / "code.jsonl"}, max_tokens=100)


def test_arguments_that_do_not_go_together(folder: Path, statistics: Statistics) -> None:
    moe, data = folder / "moe", {"code": folder / "code.jsonl"}
    task: Any = "code"
    with pytest.raises(ArgumentError, match="exactly one of --keep"):
        edgemoe.prune(moe, statistics, task, "reap")
    with pytest.raises(ArgumentError, match="cannot be used with reap"):
        edgemoe.prune(moe, statistics, task, "reap", keep=0.5, workers=2)
    with pytest.raises(ArgumentError, match="how many experts each layer keeps"):
        edgemoe.prune(moe, statistics, task, "reap", keep_experts=[4] * 4, layers="owl")
    with pytest.raises(ArgumentError, match="--shard cannot be used"):
        edgemoe.calibrate(moe, data, shard=(0, 2), workers=2)
    with pytest.raises(ArgumentError, match="workers must be in"):
        edgemoe.calibrate(moe, data, workers=0)
    with pytest.raises(ArgumentError, match="threads must be in"):
        edgemoe.recover(moe, data, "lora", folder / "out", threads=0)
    with pytest.raises(ArgumentError, match="--ray needs an output"):
        edgemoe.calibrate(moe, data, ray="local")
    with pytest.raises(ArgumentError, match="max_shard_gb"):
        edgemoe.apply_plan(moe, "plan", max_shard_gb=0)
    with pytest.raises(ArgumentError, match="got none"):
        merge_statistics([])
    with pytest.raises(ArgumentError, match="leave out --data"):
        carve(folder / "dense", folder / "out", learned="file", data="text")


def test_a_command_calls_them_usage_errors_with_its_usage(folder: Path) -> None:
    done = CliRunner().invoke(
        main, ["prune", "m", "--stats=s", "--task=t", "--method=reap", "-o", "p"]
    )

    assert done.exit_code == 2
    assert done.stderr.startswith("Usage: main prune [OPTIONS] MODEL\n")
    assert done.stderr.endswith("Error: give exactly one of --keep and --keep-experts.\n")


def test_tasks_are_one_or_more_each_once(folder: Path) -> None:
    task = edgemoe.TaskFile.load("code", folder / "code.jsonl")
    with pytest.raises(TaskFileError, match="got none"):
        edgemoe.calibrate(folder / "moe", {})
    with pytest.raises(TaskFileError, match="must differ, got 'code' twice"):
        edgemoe.calibrate(folder / "moe", [task, task])
    with pytest.raises(TaskFileError, match="must be one task, got a, b"):
        edgemoe.evaluate(folder / "moe", {"a": task.path, "b": task.path})


def test_statistics_and_options_are_those_of_the_model_and_the_method(
    folder: Path, statistics: Statistics, tmp_path: Path
) -> None:
    other = write_tiny_checkpoint("qwen2_moe", tmp_path / "other", seed=1)
    with pytest.raises(StatisticsError, match="is pruned, got statistics of checkpoint"):
        edgemoe.prune(other, statistics, "code", "reap", keep=0.5)
    with pytest.raises(PlanError, match="option of random must be NAME=VALUE"):
        edgemoe.prune(
            folder / "moe", statistics, "code", "random", keep=0.5, options={"size": 1}
        )
    with pytest.raises(PlanError, match=r"--keep-experts 4\. Use --keep"):
        edgemoe.prune(folder / "moe", statistics, "code", "camera", keep_experts=4)


def test_outputs_are_spared_unless_forced(folder: Path, statistics: Statistics) -> None:
    moe, kept = folder / "moe", folder / "kept"
    kept.write_text("mine")
    with pytest.raises(OutputError, match="must not exist"):
        edgemoe.prune(moe, statistics, "code", "reap", kept, keep=0.5)
    assert kept.read_text() == "mine"
    edgemoe.prune(moe, statistics, "code", "reap", kept, keep=0.5, force=True)
    with pytest.raises(OutputError, match="must not contain what is read"):
        edgemoe.apply_plan(moe, kept, folder, force=True)
    kept.unlink()


def test_threads_are_those_of_before_when_a_call_ends(folder: Path) -> None:
    before = torch.get_num_threads()
    with pytest.raises(TaskFileError):
        edgemoe.allocate(folder / "moe", {"code": folder / "gone"}, threads=before + 1)
    assert torch.get_num_threads() == before


def test_a_missing_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependencyError, match="'sweep'"):
        edgemoe.sweep(folder / "moe", {"code": folder / "code.jsonl"}, ["reap"], folder / "r")


def test_text_that_is_not_utf_8_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes("Maß".encode("latin-1"))
    with pytest.raises(CarveError, match="must be UTF-8"):
        carve(folder / "dense", tmp_path / "out", data=tmp_path / "latin")


def test_what_cannot_be_streamed_is_done_whole_and_said(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No family of today refuses: the first opening is made to."""

    def refuse(*_: object, **__: object) -> None:
        raise StreamingError("its layers cannot be told apart.")

    data = {"code": folder / "code.jsonl"}
    expected = edgemoe.calibrate(folder / "moe", data, tmp_path / "streamed")
    plan = edgemoe.prune(folder / "moe", expected, "code", "reap", keep=0.5)
    edgemoe.apply_plan(folder / "moe", plan, tmp_path / "a")
    monkeypatch.setattr("edgemoe.calibrate.streamed.calibrate_streamed", refuse)
    monkeypatch.setattr("edgemoe.apply.streamed.apply_streamed", refuse)
    done = CliRunner().invoke(
        main,
        [
            *("calibrate", str(folder / "moe"), f"--task=code={data['code']}"),
            *("-o", str(tmp_path / "whole")),
        ],
    )
    assert done.stderr == (
        "its layers cannot be told apart. The whole model is loaded instead, in this process.\n"
    )
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "streamed").read_bytes()
    logging.getLogger("edgemoe.api").setLevel(logging.NOTSET)
    edgemoe.apply_plan(folder / "moe", plan, tmp_path / "b")
    shards = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert edgemoe.load_model(tmp_path / "b").shape == edgemoe.load_model(tmp_path / "a").shape
    assert len(shards[0]) == len(shards[1])
