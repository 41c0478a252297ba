"""Progress without a terminal: few lines, times, a total, and nothing rewritten."""

from __future__ import annotations

import subprocess
import sys

from edgemoe.progress_lines import LineProgress, StageLines, describe_seconds


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_hours_of_steps_are_some_dozens_of_lines() -> None:
    clock = Clock()
    lines: list[str] = []
    progress = LineProgress("calibrate", 3600, clock, lines.append)
    for _ in range(3600):
        clock.now += 2
        progress.advance()
    progress.finish()

    assert lines[0] == "calibrate: 1 of 3600, 2s so far, about 1h59m left"
    assert lines[-1] == "calibrate: 3600 of 3600, 2h00m in all"
    assert 30 < len(lines) < 100


def test_short_work_is_silent() -> None:
    clock = Clock()
    lines: list[str] = []
    progress = LineProgress("apply", None, clock, lines.append)
    for _ in range(10):
        clock.now += 0.1
        progress.advance("loss 1")
    progress.finish()
    assert lines == []
    clock.now += 5
    progress.advance("loss 2")
    progress.finish()
    assert lines == ["apply: 11, loss 2, 6s so far", "apply: 11, 6s in all"]


def test_each_stage_is_a_line_with_the_time_that_is_left() -> None:
    clock = Clock()
    lines: list[str] = []
    stages = StageLines(4, clock, lines.append)
    for name in ("open", "trace", "write", "verify", "one more"):
        stages.begin(name)
        clock.now += 40
    stages.finish()

    assert lines == [
        "stage 1 of 4: open",
        "stage 2 of 4: trace, 40s so far",
        "stage 3 of 4: write, 1m20s so far, about 1m20s left",
        "stage 4 of 4: verify, 2m00s so far, about 40s left",
        "stage 5 of 5: one more, 2m40s so far, about 40s left",
        "done: 5 stages, 3m20s in all",
    ]
    assert [describe_seconds(s) for s in (0.4, 59.6, 3599, 7500)] == [
        "0s", "1m00s", "59m59s", "2h05m"
    ]  # fmt: skip


SCRIPT = """
import time
from edgemoe.progress import in_lines, track
list(track(range(3), "for a library"))
with in_lines():
    for _ in track(range(4), "the outer work"):
        time.sleep(0.8)
        list(track(range(3), "a part of it"))
"""


def test_a_command_writes_lines_and_a_library_call_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True
    )

    assert "\r" not in done.stderr
    assert done.stderr.splitlines() == [
        "the outer work: 3 of 4, 2s so far, about 1s left",
        "the outer work: 4 of 4, 3s in all",
    ]
