"""One bar at a time, on a real terminal."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

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
