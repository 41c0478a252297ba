"""``optimum-cli export edgemoe``: the same command, found by optimum."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent
OPTIMUM = (BIN / "optimum-cli", "export", "edgemoe")
EDGEMOE = (sys.executable, "-m", "edgemoe.cli", "export")


def run(
    command: tuple[str | Path, ...], *arguments: object
) -> subprocess.CompletedProcess[str]:
    # One thread: sums in float32 depend on how many there are.
    return subprocess.run(
        [*command, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_optimum_lists_the_command() -> None:
    told = run((BIN / "optimum-cli", "export"), "--help")

    assert told.returncode == 0, told.stderr
    assert "edgemoe   Write MODEL as a bundle" in told.stdout


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_is_that_of_edgemoe_export(option: str) -> None:
    told, expected = run(OPTIMUM, option), run(EDGEMOE, option)

    assert told.returncode == expected.returncode == 0, told.stderr
    first, _, rest = told.stdout.partition("\n")
    assert first == "Usage: optimum-cli export edgemoe [OPTIONS] MODEL"
    assert rest == expected.stdout.partition("\n")[2]
    assert "--calibration-tokens" in rest


@pytest.mark.slow
@pytest.mark.parametrize(
    ("status", "arguments"),
    [
        (1, ("gone", "-o", "out", "--target", "cpu")),
        (2, ()),
        (2, ("gone", "-o", "out", "--target", "abacus")),
        (2, ("gone", "-o", "out", "--target", "cpu", "--held-out-tokens=0")),
        (2, ("--tarjet", "cpu")),
        # An abbreviation that argparse would take.
        (2, ("gone", "-o", "out", "--targ", "cpu")),
        (2, ("gone", "--", "--target")),
    ],
)
def test_wrong_calls_and_refusals_end_as_those_of_edgemoe_export(
    status: int, arguments: tuple[str, ...], tmp_path: Path
) -> None:
    placed = [tmp_path / word if word in {"gone", "out"} else word for word in arguments]

    told, expected = run(OPTIMUM, *placed), run(EDGEMOE, *placed)

    assert told.returncode == expected.returncode == status
    assert told.stdout == expected.stdout == ""
    errors = [text[text.index("Error: ") :] for text in (told.stderr, expected.stderr)]
    assert errors[0] == errors[1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.fused
def test_a_bundle_is_that_of_edgemoe_export(road: Path, tmp_path: Path) -> None:
    # Rungs of the ladder and speed are timed, and no two runs measure the same.
    untimed = ("--no-ladder", "--no-speed")
    asked = (road / "moe", f"--task=code={road / 'code.jsonl'}", "--keep=0.5", *untimed)

    for command, name in ((OPTIMUM, "ours"), (EDGEMOE, "expected")):
        done = run(command, *asked, "--target", "cpu", "-o", tmp_path / name)
        assert done.returncode == 0, done.stderr

    assert contents(tmp_path / "ours") == contents(tmp_path / "expected")


def contents(folder: Path) -> dict[str, bytes]:
    found = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
    assert "manifest.json" in found
    return found
