"""A full disk is told as one, whichever library writes."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING

import pytest

from edgemoe.disk import describe_full, human_bytes, require_space
from edgemoe.errors import OutputError

if TYPE_CHECKING:
    from pathlib import Path

# Files of 8 kB at most, as `ulimit -f 8` makes them; each library then writes more.
FILL = """
    import os, resource, sys
    import numpy, onnx, safetensors.numpy, safetensors.torch, torch
    from edgemoe.disk import describe_full

    values = torch.ones(20_000)
    graph = onnx.helper.make_graph(
        [], "g", [], [], [onnx.numpy_helper.from_array(values.numpy(), "w")]
    )
    model = onnx.helper.make_model(graph)
    writers = {
        "open": lambda: open("a", "wb").write(values.numpy().tobytes()),
        "safetensors.torch": lambda: safetensors.torch.save_file({"w": values}, "b"),
        "safetensors.numpy": lambda: safetensors.numpy.save_file({"w": values.numpy()}, "c"),
        "numpy": lambda: numpy.save("d.npy", values.numpy()),
        "numpy.tofile": lambda: values.numpy().tofile("e"),
        "torch": lambda: torch.save(values, "f"),
        "onnx": lambda: onnx.save(model, "g"),
    }
    os.chdir(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
    for name, write in writers.items():
        try:
            write()
            print(name, "no error")
        except Exception as error:
            print(name, describe_full(error))
"""


def test_each_library_that_writes_is_understood(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FILL), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    told = dict(line.split(" ", 1) for line in ran.stdout.splitlines())
    assert len(told) == 7
    assert set(told.values()) <= {"File too large", "No space left on device"}


@pytest.mark.parametrize(
    "error",
    [OSError("no"), FileNotFoundError(2, "no"), RuntimeError("no"), OutputError("no")],
)
def test_other_errors_are_not(error: Exception) -> None:
    assert describe_full(error) is None


def test_what_is_missing_is_known_before(tmp_path: Path) -> None:
    require_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(OutputError, match=r"1152921504\.61 GB free, got [\d.]+ GB: .* missing"):
        require_space(tmp_path / "not" / "yet", 1 << 60)


def test_sizes_are_told_in_powers_of_ten() -> None:
    told = [human_bytes(size) for size in (0, 999, 1000, 93_100_000, 2.5e9)]
    assert told == ["0 B", "999 B", "1.0 kB", "93.1 MB", "2.50 GB"]
