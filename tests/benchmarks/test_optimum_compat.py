"""The comparison with optimum, whose environment is played by a script."""

from __future__ import annotations

import json
import sys
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from benchmarks import optimum_compat
from edgemoe.models import checkpoint
from edgemoe_runtime.bundle import manifest_file

if TYPE_CHECKING:
    from pathlib import Path

END = 2


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    tokenizer = SimpleNamespace(encode=lambda _: SimpleNamespace(ids=[7, 8]))
    monkeypatch.setattr(checkpoint, "load_tokenizer", lambda _: tokenizer)
    return optimum_compat


def environment(directory: Path, answer: list[int]) -> Path:
    """A finished environment whose Python writes down its arguments and answers."""
    python = directory / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        f"#!{sys.executable}\nimport json, sys\n"
        f"open({str(directory / 'arguments')!r}, 'w').write(json.dumps(sys.argv[1:]))\n"
        f"print('some library says hello')\nprint({answer})\n"
    )
    python.chmod(0o755)
    (directory / ".complete").touch()
    return directory


@pytest.mark.parametrize(
    ("precision", "optimum", "session", "eager", "status"),
    [
        ("fp32", [5, 6, END], [5, 6], [5, 6, END], 0),
        ("int4", [5, 6], [5, 6], [9, 9], 0),
        ("fp32", [5, 6], [5, 6], [9, 9], 1),
        ("int4", [5, 6], [6, 6], [5, 6], 1),
    ],
)
def test_status_says_whether_the_tokens_are_equal(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    optimum: list[int],
    session: list[int],
    eager: list[int],
    status: int,
) -> None:
    manifest = SimpleNamespace(
        precision=precision,
        model=SimpleNamespace(eos_token_ids=(END,)),
        task=lambda _: ("model", SimpleNamespace(graph="model.onnx")),
    )
    monkeypatch.setattr(manifest_file, "load_manifest", lambda _: manifest)
    monkeypatch.setattr(script, "generate_with_session", lambda *_: session)
    monkeypatch.setattr(script, "generate_with_transformers", lambda *_: eager)
    venv = environment(tmp_path / "venv", optimum)
    assert script.compare(tmp_path, tmp_path, None, venv) == status
    arguments = json.loads((venv / "arguments").read_text())
    assert arguments[:3] == [optimum_compat.__file__, str(tmp_path), "--inside"]
    assert json.loads(arguments[3]) == {"graph": "model.onnx", "ids": [7, 8]}
