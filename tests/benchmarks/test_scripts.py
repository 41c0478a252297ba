"""Every script of benchmarks/ and examples/ is a module that explains itself."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(
    path for top in ("benchmarks", "examples") for path in (ROOT / top).rglob("*.py")
)


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


SCRIPTS = {module_of(path) for path in FILES if "__main__" in path.read_text("utf-8")}


def test_a_script_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "benchmarks.compression.condense", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--together" in done.stdout


@pytest.mark.parametrize("module", sorted(SCRIPTS))
def test_a_script_explains_itself(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # In this process, where torch is imported already: thirty processes would take a minute.
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(module).main()
    assert ended.value.code == 0
    told = capsys.readouterr().out
    assert re.match(r"(?i)usage: ", told)
    assert "--help" in told


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_commands_in_docstrings_name_modules_that_exist(path: Path) -> None:
    text = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    assert text
    assert not re.search(r"python (benchmarks|examples)/", text)
    named = set(re.findall(r"python -m ((?:benchmarks|examples)\.[a-z][\w.]+)", text))
    assert named <= SCRIPTS
    if path.parent.name != "demo" and module_of(path) in SCRIPTS:
        assert module_of(path) in named


def test_commands_in_documents_name_modules_that_exist() -> None:
    folders = ("docs", "examples", "exporters", "runtime")
    pages = [
        *ROOT.glob("*.md"),
        *(page for name in folders for page in (ROOT / name).rglob("*.md")),
    ]
    text = "\n".join(page.read_text("utf-8") for page in pages)
    assert not re.search(r"python (benchmarks|examples)/", text)
    named = set(re.findall(r"python -m ((?:benchmarks|examples)\.[a-z][\w.]+)", text))
    assert (
        {"benchmarks.adaptive_k.policies", "benchmarks.compression.costs"} <= named <= SCRIPTS
    )
