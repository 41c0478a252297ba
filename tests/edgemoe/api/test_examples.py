"""The examples of docstrings, run one after the other on the files that they name."""

from __future__ import annotations

import doctest
import shutil
from importlib import import_module
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

# Later examples read what earlier ones write.
IN_ORDER = (
    "load_model",
    "calibrate",
    "merge_statistics",
    "prune",
    "decompose",
    "apply_plan",
    "allocate",
    "evaluate",
    "recover",
    "sweep",
    "carve",
)


@pytest.mark.slow
def test_the_examples_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shutil.copytree(folder, tmp_path / "here"))
    for name in IN_ORDER:
        function = getattr(import_module(f"edgemoe.api.{name}"), name)
        runner = doctest.DocTestRunner(optionflags=doctest.FAIL_FAST)
        (example,) = doctest.DocTestFinder(recurse=False).find(function, name, globs={})
        # Nothing is printed: what an example names is what its reader goes on with.
        assert runner.run(example, out=pytest.fail) == (0, len(example.examples))
    written = {path.name for path in (tmp_path / "here").iterdir()}
    assert written == {path.name for path in folder.iterdir()} | {
        *("code.stats", "code.plan.json", "moe-code", "better", "report", "carved")
    }
