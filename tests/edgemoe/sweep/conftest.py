from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

from edgemoe.models.checkpoint import load_model
from edgemoe.models.tiny import write_tiny_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

LINES = 32


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model ``moe``, and what it says after low and after high words, as two tasks.

    Of its own text it is surer than of any other, so each expert that goes costs something.
    """
    folder = tmp_path_factory.mktemp("sweep")
    write_tiny_checkpoint("mixtral", folder / "moe", num_hidden_layers=2)
    model: Any = load_model(folder / "moe").model
    torch.manual_seed(1)
    for name, first in {"low": 3, "high": 50}.items():
        starts = torch.arange(first, first + LINES)[:, None]
        drawn = model.generate(
            starts,
            attention_mask=torch.ones_like(starts),
            max_new_tokens=14,
            min_new_tokens=14,
            do_sample=True,
            temperature=0.5,
            top_k=0,
            pad_token_id=0,
        )
        texts = [" ".join(f"w{token}" for token in row) for row in drawn.tolist()]
        write_rows(folder / f"{name}.jsonl", [{"text": text} for text in texts])
    return folder


def write_rows(path: Path, rows: list[dict[str, object]]) -> None:
    """Write a task file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="session")
def read_report() -> Callable[[Path], dict[str, bytes]]:
    """A function from a report to its files' bytes, without the times."""

    def read(report: Path) -> dict[str, bytes]:
        return {
            str(file.relative_to(report)): file.read_bytes()
            for file in sorted(report.rglob("*"))
            if file.is_file() and file.name != "times.csv"
        }

    return read
