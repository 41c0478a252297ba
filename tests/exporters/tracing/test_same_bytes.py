"""The same export gives the same graph, whatever names hash to in a process."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from edgemoe.models.tiny import write_tiny_checkpoint

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.slow
def test_a_graph_does_not_depend_on_the_hashes_of_names(tmp_path: Path) -> None:
    # Its layers are of two types, which transformers keeps in a set.
    path = write_tiny_checkpoint("gemma4_text", tmp_path / "moe")
    found = set()
    for seed in ("1", "2", "3"):
        bundle = tmp_path / f"bundle-{seed}"
        command = ["export", str(path), "--target", "cpu", "--precision", "fp32"]
        subprocess.run(
            [sys.executable, "-m", "edgemoe.cli", *command, "-o", str(bundle)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
        )
        found.add(hashlib.sha256((bundle / "model.onnx").read_bytes()).hexdigest())
    assert len(found) == 1
