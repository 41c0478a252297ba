"""One bar at a time, on a real terminal."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest

from edgemoe.progress import ProgressEvent, counting, reporting_to, telling, track

SCRIPT = """
import time
from edgemoe.progress import counting, track

with counting(2, "the outer work") as advance:
    for _ in range(2):
        for _ in track(range(3), "a part of it"):
            time.sleep(0.1)
        advance()
for _ in track(range(3), "and afterwards"):
    time.sleep(0.1)
"""


def test_only_the_outermost_bar_is_drawn() -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stderr=theirs, env=environment
    ) as run:
        os.close(theirs)
        drawn = b""
        while True:
            try:
                chunk = os.read(ours, 4096)
            except OSError:  # Linux says so when the other end is closed
                break
            if not chunk:
                break
            drawn += chunk
    os.close(ours)

    assert run.returncode == 0
    assert b"the outer work" in drawn
    assert b"and afterwards" in drawn
    assert b"a part of it" not in drawn


def test_a_listener_hears_the_outermost_work_step_by_step() -> None:
    heard: list[ProgressEvent] = []

    with reporting_to(heard.append):
        with telling(2, "train") as tell:
            for step in range(2):
                assert list(track([1, 2], "a part of it")) == [1, 2]
                tell(f"loss {step}")
        assert list(track(iter("ab"), "and afterwards")) == ["a", "b"]
    assert list(track("ab", "for nobody")) == ["a", "b"]

    assert [(e.description, e.done, e.total, e.note) for e in heard] == [
        ("train", 0, 2, None),
        ("train", 1, 2, "loss 0"),
        ("train", 2, 2, "loss 1"),
        ("and afterwards", 0, None, None),
        ("and afterwards", 1, None, None),
        ("and afterwards", 2, None, None),
    ]


def test_a_listener_that_raises_ends_the_work_and_the_next_call_is_heard() -> None:
    def give_up(event: ProgressEvent) -> None:
        if event.done == 1:
            raise TimeoutError

    heard: list[ProgressEvent] = []
    with reporting_to(heard.append):
        with (
            pytest.raises(TimeoutError),
            reporting_to(give_up),
            counting(3, "long") as advance,
        ):
            advance()
        with counting(1, "short"):
            pass

    assert [event.description for event in heard] == ["short"]
