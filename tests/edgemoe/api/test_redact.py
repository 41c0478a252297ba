"""A copy for others has no text and no path, and is still read."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

import edgemoe
from edgemoe.api.redact import redact
from edgemoe.cli import main
from edgemoe.errors import ArgumentError, OutputError, StatisticsError

if TYPE_CHECKING:
    from pathlib import Path


def test_statistics_are_shared_without_their_text(folder: Path, tmp_path: Path) -> None:
    task = {"code": folder / "code.jsonl"}
    statistics = edgemoe.calibrate(folder / "moe", task, tmp_path / "stats", max_tokens=200)
    redact(tmp_path / "stats", tmp_path / "shared")
    copy = edgemoe.Statistics.load(tmp_path / "shared")
    assert (statistics.has_tokens, copy.has_tokens) == (True, False)
    # Sums stay: a plan from them is the plan of the original.
    plans = [
        edgemoe.prune(folder / "moe", one, "code", "reap", keep=0.5)
        for one in (statistics, copy)
    ]
    assert plans[0].layers == plans[1].layers
    with pytest.raises(StatisticsError, match="must hold the calibration's tokens"):
        edgemoe.prune(folder / "moe", copy, "code", "naee", keep=0.5)
    with pytest.raises(OutputError, match="must not exist"):
        redact(tmp_path / "stats", tmp_path / "shared")
    bare = edgemoe.calibrate(folder / "moe", task, max_tokens=200, texts=False)
    assert bare.sha256 == copy.sha256

    told = CliRunner().invoke(main, ["inspect", str(tmp_path / "stats"), "--redact", "--json"])
    facts = json.loads(told.stdout)
    assert facts["holds_texts"] is True
    assert "path" not in facts
    assert str(tmp_path) not in told.stdout


def test_what_holds_no_text_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="got a checkpoint"):
        redact(folder / "moe", tmp_path / "copy")
    assert list(tmp_path.iterdir()) == []
