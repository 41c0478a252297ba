"""An export in fp16 tells the largest activation, and where float16 may not hold it."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest
from safetensors.torch import load_file, save_file

from edgemoe_exporters.export import export_bundle
from edgemoe_exporters.request import ExportRequest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from edgemoe_exporters.report import ExportReport

pytestmark = pytest.mark.fused


def export(path: Path, task: Path, output: Path, precision: str) -> ExportReport:
    request = ExportRequest(
        model=path,
        output=output,
        target="cpu",
        precision=precision,
        tasks={"t": task},
        keep=1.0,
        speed=False,
    )
    return export_bundle(request)


@pytest.mark.slow
def test_the_largest_activation_is_told_and_judged(
    checkpoint: Path, write_task: Callable[..., Path], tmp_path: Path
) -> None:
    task = write_task(tmp_path / "t.jsonl", 5, 60)
    usual = export(checkpoint, task, tmp_path / "usual", "fp16")
    assert usual.largest_activation is not None
    assert 0 < usual.largest_activation < 1000
    told = f"largest activation on the data is {usual.largest_activation:.3g}"
    assert any(told in note for note in usual.notes)
    assert usual.to_json()["largest_activation"] == usual.largest_activation
    assert export(checkpoint, task, tmp_path / "whole", "fp32").largest_activation is None

    shutil.copytree(checkpoint, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    # The tokens of the task, in one channel: within float16, but near its end.
    tensors["model.embed_tokens.weight"][5:60, 7] = 60_000
    save_file(tensors, file, {"format": "pt"})
    near = export(tmp_path / "model", task, tmp_path / "near", "fp16")
    assert near.largest_activation is not None
    assert near.largest_activation >= 60_000
    assert any("what float16 holds" in note for note in near.notes)
