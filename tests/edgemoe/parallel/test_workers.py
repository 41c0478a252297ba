"""The same jobs on every kind of worker."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from edgemoe.errors import PlanError, SpreadError
from edgemoe.parallel.cluster import share_out
from edgemoe.parallel.opening import open_workers
from edgemoe.parallel.workers import (
    InProcess,
    JobProgress,
    Processes,
    RayCluster,
    Workers,
    WorkerTraceback,
)
from tests.edgemoe.parallel import jobs

if TYPE_CHECKING:
    from collections.abc import Iterator

PLACES = [
    InProcess(),
    Processes(2),
    pytest.param(
        RayCluster(address="local", count=2),
        marks=[
            pytest.mark.slow,
            pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed"),
        ],
    ),
]


PARENT = """
import sys
from edgemoe.parallel.opening import open_workers
from edgemoe.parallel.workers import Processes
from tests.edgemoe.parallel.jobs import sleep_long

if __name__ == "__main__":
    with open_workers(Processes(2)) as workers:
        workers.map(sleep_long, [sys.argv[1]] * 2, "")
"""


# Before this process is in a cluster.
@pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")
def test_a_cluster_that_does_not_answer_is_one_message() -> None:
    with (
        pytest.raises(SpreadError, match=r"must answer at '127.0.0.1:1', got: .*`ray start"),
        open_workers(RayCluster(address="127.0.0.1:1")),
    ):
        pass


@pytest.fixture(scope="module", params=PLACES, ids=lambda executor: type(executor).__name__)
def workers(request: pytest.FixtureRequest) -> Iterator[Workers]:
    with open_workers(request.param) as opened:
        yield opened


def test_results_come_in_the_order_of_the_jobs(workers: Workers) -> None:
    assert workers.map(jobs.square, range(9), "") == [n * n for n in range(9)]
    assert workers.map(jobs.square, [], "") == []


def test_the_first_failure_is_raised_as_it_was(workers: Workers) -> None:
    with pytest.raises(PlanError, match=r"^a number must not be seven, got 7\.$") as caught:
        workers.map(jobs.refuse_seven, [1, 7, 2], "")
    assert isinstance(caught.value.__cause__, WorkerTraceback)
    assert "in refuse_seven" in str(caught.value.__cause__)
    with pytest.raises(SpreadError, match="failed with TwoArguments: this and that 3"):
        workers.map(jobs.raise_unpicklable, [3], "")
    # And they go on working.
    assert workers.map(jobs.square, [5], "") == [25]


def test_a_dead_workers_job_goes_to_another(workers: Workers, tmp_path: Path) -> None:
    if workers.count == 1:
        pytest.skip("there is no other process that could die")
    given = [(str(tmp_path), number) for number in range(3)]
    assert workers.map(jobs.die_at_first, given, "") == [0, 1, 2]
    with pytest.raises(SpreadError, match=r"job 1 of 1, whose worker died 3 times, last: .+"):
        workers.map(jobs.die, [0], "")
    assert workers.map(jobs.square, [5], "") == [25]


def test_progress_within_jobs_is_asked_for(workers: Workers) -> None:
    asked: list[int] = []

    def done() -> int:
        asked.append(1)
        return 99

    assert workers.map(jobs.square, [1, 2], "", steps=JobProgress(4, done)) == [1, 4]
    assert asked


def test_local_processes_are_used_again_and_what_cannot_be_sent_is_refused() -> None:
    with open_workers(Processes(2)) as workers:
        assert len(set(workers.map(jobs.identify, range(8), ""))) == 2
        with pytest.raises(SpreadError, match="must be picklable"):
            workers.map(lambda number: number, [1], "")
    with (
        pytest.raises(SpreadError, match=r"must be in \[1, inf\), got 0"),
        open_workers(Processes(0)),
    ):
        pass


def test_local_processes_end_with_a_killed_parent(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    root = str(Path(__file__).parents[3])
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    parent = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)], env={**os.environ, "PYTHONPATH": path}
    )
    children = wait_for_numbers(tmp_path, 2)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    end = time.monotonic() + 20
    while any(Path("/proc", str(child)).exists() for child in children):
        assert time.monotonic() < end
        time.sleep(0.05)


def wait_for_numbers(folder: Path, count: int) -> list[int]:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        found = [int(file.name) for file in folder.iterdir() if file.name.isdigit()]
        if len(found) == count:
            return found
        time.sleep(0.05)
    raise AssertionError("the workers did not start")


@pytest.mark.slow
def test_cpus_of_a_cluster_are_shared_out() -> None:
    assert share_out([16, 8, 8], None) == (3, 8)
    assert share_out([16, 8], 4) == (4, 4)
    assert share_out([2], 2) == (2, 1)
    assert share_out([2], 5) == (5, 1)
    with pytest.raises(SpreadError, match="must have a machine"):
        share_out([], None)
    with pytest.raises(SpreadError, match="got 0"):
        share_out([4], 0)
