"""Several workers write the file that one process writes, whatever becomes of them."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np
import pytest

from edgemoe.calibrate.sample import Window
from edgemoe.calibrate.shards import (
    ShardJob,
    calibrate_in_shards,
    calibrate_shard,
    count_shards,
)
from edgemoe.calibrate.statistics import Statistics
from edgemoe.calibrate.streamed import calibrate_streamed
from edgemoe.calibrate.windows import Windows
from edgemoe.errors import CheckpointError, OutputError, SpreadError
from edgemoe.layerwise.finished_layers import layers_done
from edgemoe.parallel.workers import InProcess, Processes, RayCluster
from edgemoe.resume import WorkDirectory, partial_path
from edgemoe.tasks import TaskFile
from edgemoe.versions import library_versions
from edgemoe.work_directory import create_work

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")


@pytest.fixture
def tasks(tmp_path: Path) -> list[TaskFile]:
    draw = np.random.Generator(np.random.PCG64(7))
    found = []
    for name, lengths in {"one": (7, 30, 1, 90, 22), "two": (12, 40)}.items():
        lines = [" ".join(f"w{word}" for word in draw.integers(0, 96, n)) for n in lengths]
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
        found.append(TaskFile.load(name, file))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "executor",
    [
        InProcess(),
        Processes(3),
        pytest.param(RayCluster(address="local", count=2), marks=needs_ray),
    ],
    ids=lambda executor: type(executor).__name__,
)
def test_the_bytes_are_those_of_one_process(
    make_checkpoint: Callable[..., Path],
    tasks: list[TaskFile],
    tmp_path: Path,
    executor: InProcess | Processes | RayCluster,
) -> None:
    path = make_checkpoint("glm4_moe", max_shard_size="30KB")
    one, several = tmp_path / "one", tmp_path / "several"
    calibrate_streamed(path, tasks, one, max_tokens=100)

    found = calibrate_in_shards(path, tasks, several, executor, max_tokens=100)

    assert several.read_bytes() == one.read_bytes()
    assert found.sha256 == Statistics.load(one).sha256
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_its_layers_are_kept(
    make_checkpoint: Callable[..., Path], tasks: list[TaskFile], tmp_path: Path
) -> None:
    path = make_checkpoint("mixtral", num_hidden_layers=12)
    calibrate_streamed(path, tasks, tmp_path / "one")
    output = tmp_path / "several"
    kept: list[int] = []

    def kill_one() -> None:
        progress = partial_path(partial_path(output) / "shard-00000") / "pass-progress.json"
        end = time.monotonic() + 120
        while not progress.exists() and time.monotonic() < end:
            time.sleep(0.005)
        for process in multiprocessing.active_children():
            process.kill()
        kept.append(json.loads(progress.read_text())["layers_done"])

    killer = threading.Thread(target=kill_one)
    killer.start()
    calibrate_in_shards(path, tasks, output, Processes(2))
    killer.join()

    assert 1 <= kept[0] < 12
    assert output.read_bytes() == (tmp_path / "one").read_bytes()


@pytest.mark.slow
def test_kills_of_the_command_change_nothing(
    make_checkpoint: Callable[..., Path], tasks: list[TaskFile], tmp_path: Path
) -> None:
    path = make_checkpoint("qwen2_moe", num_hidden_layers=6)
    one, several = tmp_path / "one", tmp_path / "several"
    calibrate_streamed(path, tasks, one)
    given = [f"--task={task.name}={tmp_path / task.name}.jsonl" for task in tasks]
    command = [sys.executable, "-m", "edgemoe.cli", "calibrate", str(path), *given]
    command += ["--workers=2", "--threads=1", "-o", str(several)]
    shards = [partial_path(several) / f"shard-0000{index}" for index in range(2)]

    # Of 12 layers in two shards; what a run finished is there when the next one starts.
    for least in (1, 7):
        with subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}) as run:
            while run.poll() is None and not any(shard.exists() for shard in shards):
                works = [WorkDirectory(partial_path(shard)) for shard in shards]
                if sum(map(layers_done, works)) >= least:
                    break
                time.sleep(0.002)
            run.kill()
        assert run.returncode == -signal.SIGKILL
        assert not several.exists()
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})

    assert several.read_bytes() == one.read_bytes()
    assert not list(tmp_path.glob("*.partial"))


def test_what_fails_leaves_nothing_and_what_is_finished_stays(
    make_checkpoint: Callable[..., Path], tasks: list[TaskFile], tmp_path: Path
) -> None:
    path = make_checkpoint("mixtral")
    output = tmp_path / "several"
    with pytest.raises(CheckpointError):
        calibrate_in_shards(tmp_path / "none", tasks, output, InProcess())
    weights = path / "model.safetensors"
    content = weights.read_bytes()
    # Headers are whole; the last layer's tensors are not.
    weights.write_bytes(content[: len(content) - 10])
    with pytest.raises(CheckpointError):
        calibrate_in_shards(path, tasks, output, InProcess())
    assert not list(tmp_path.glob("*.partial"))


def test_a_worker_must_see_the_same_files_and_versions(
    make_checkpoint: Callable[..., Path], tasks: list[TaskFile], tmp_path: Path
) -> None:
    job = ShardJob(
        path=make_checkpoint("mixtral"),
        tasks=tasks,
        output=tmp_path / "shard",
        shard=(0, 2),
        max_tokens=None,
        sequence_length=64,
        device="cpu",
        threads=None,
        versions=library_versions(),
    )
    refused = [
        (replace(job, path=tmp_path / "elsewhere"), "checkpoint must be at the same path"),
        (replace(job, output=tmp_path / "no" / "shard"), "directory of -o must be at the same"),
        (replace(job, versions={"torch": "1.0"}), "must have the versions {'torch': '1.0'}"),
    ]
    for changed, rule in refused:
        with pytest.raises(SpreadError, match=rule):
            calibrate_shard(changed)
    assert not (tmp_path / "shard").exists()


def test_other_work_beside_the_output_is_refused(
    make_checkpoint: Callable[..., Path], tasks: list[TaskFile], tmp_path: Path
) -> None:
    output = tmp_path / "several"
    work = partial_path(output)
    create_work(work, {"command": "calibrate shards", "options": []})
    (work / "shards.json").write_text("{}")
    with pytest.raises(OutputError, match="unfinished work must be finished by the command"):
        calibrate_in_shards(make_checkpoint("mixtral"), tasks, output, InProcess())


@pytest.mark.parametrize(
    ("lines", "workers", "count"),
    [([1, 2, 3, 4], 2, 2), ([1, 2, 3], 8, 3), ([2], 4, 1), ([1, 3, 5], 2, 1)],
)
def test_no_shard_is_empty(lines: list[int], workers: int, count: int) -> None:
    windows = Windows(
        by_task={"t": [Window(line=line, start=0, ids=[1]) for line in lines]},
        sequence_length=8,
        shard=(0, 1),
        max_tokens=None,
    )
    assert count_shards(windows, workers) == count
