"""Weights that are no numbers are refused by name, whole and layer by layer."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

import edgemoe
from edgemoe.errors import CheckpointError
from edgemoe.models import load_model
from edgemoe.models.tiny import write_tiny_checkpoint

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("model.layers.2.mlp.gate.weight", "nan", "NaN in model.layers.2.mlp.gate.weight"),
        ("model.embed_tokens.weight", "-inf", "infinity in model.embed_tokens.weight"),
        ("lm_head.weight", "nan", "NaN in lm_head.weight"),
    ],
)
def test_a_weight_that_is_no_number_is_named(
    tmp_path: Path, name: str, value: str, told: str
) -> None:
    path = write_tiny_checkpoint("qwen3_moe", tmp_path / "moe", dtype=torch.bfloat16)
    tensors = load_file(path / "model.safetensors")
    tensors[name][1, 1] = float(value)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"got {told}"):
        load_model(path)
    lines = [{"text": " ".join(f"w{(n * k) % 96}" for k in range(20))} for n in range(1, 9)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if name != "lm_head.weight":  # calibration needs no head
        with pytest.raises(CheckpointError, match=f"got {told}"):
            edgemoe.calibrate(path, {"t": tmp_path / "t.jsonl"})
    with pytest.raises(CheckpointError, match=f"got {told}"):
        edgemoe.evaluate(path, {"t": tmp_path / "t.jsonl"})


def test_large_weights_are_finite() -> None:
    from edgemoe.models.loading import refuse_not_finite

    refuse_not_finite("w", torch.full((1000,), torch.finfo(torch.float32).max))
    refuse_not_finite("w", torch.full((4,), torch.finfo(torch.float16).max).half())
    refuse_not_finite("w", torch.empty(3, device="meta"))
