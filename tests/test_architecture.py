from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("edgemoe", "exporters/edgemoe_exporters", "runtime/edgemoe_runtime")
SOURCES = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
LONGEST_FILE = 400  # lines
HEAVY = (
    "torch",
    "transformers",
    "onnx",
    "onnx_ir",
    "safetensors",
    "scipy",
    "onnxruntime",
    "optimum",
)


def test_imports_go_down_the_layers_only() -> None:
    lint = Path(sys.executable).with_name("lint-imports")

    done = subprocess.run([lint, "--no-cache"], cwd=ROOT, capture_output=True, text=True)

    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "module",
    [
        "edgemoe_runtime",
        "edgemoe.cli",
        "edgemoe.plans.plan",
        "edgemoe_exporters.compiler.compile",
    ],
)
def test_importing_what_a_device_runs_costs_no_heavy_package(module: str) -> None:
    code = f"import sys, {module}; print(*sorted(set({HEAVY!r}) & set(sys.modules)))"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_files_say_one_thing() -> None:
    lengths = {str(path): len(path.read_text("utf-8").splitlines()) for path in SOURCES}

    assert {name: lines for name, lines in lengths.items() if lines > LONGEST_FILE} == {}


def test_modules_are_named_after_what_they_do() -> None:
    vague = {"utils", "common", "helpers", "misc", "util", "tools"}

    assert [path for path in SOURCES if path.stem in vague] == []
