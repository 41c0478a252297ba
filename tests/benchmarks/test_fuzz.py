"""Damaged files are refused in one short message, or read: `benchmarks.fuzzing` tries more."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.fuzz.formats import FORMATS
from benchmarks.fuzz.mutations import in_header, in_line, mutate_bytes, mutate_json

ROOT = Path(__file__).parents[2]


@given(st.integers(0, 10**6))
def test_a_seed_names_the_damage(seed: int) -> None:
    document = json.dumps({"a": [1, {"b": "c"}], "d": None}).encode()
    for mutate, content in (
        (mutate_json, document),
        (mutate_bytes, document),
        (in_line(mutate_json), document + b"\n" + document + b"\n"),
    ):
        once, again = (mutate(content, random.Random(seed)) for _ in range(2))
        assert once == again


def test_a_header_is_damaged_and_the_tensors_are_not(tmp_path: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    save_file({"a": np.ones(4, np.float32)}, tmp_path / "f", metadata={"edgemoe": '{"x": 1}'})
    content = (tmp_path / "f").read_bytes()
    changed = in_header(mutate_json)(content, random.Random(1))
    assert changed != content
    assert changed.endswith(np.ones(4, np.float32).tobytes())


@pytest.mark.slow
def test_damaged_files_are_refused_in_a_line_or_read() -> None:
    """Three cases of each format; the good files that they are made from must pass."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.fuzzing", "--cases", str(3 * len(FORMATS))],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == len(FORMATS) + 2
