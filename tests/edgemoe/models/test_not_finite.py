"""Weights that are no numbers are refused by name, whole and layer by layer."""

from __future__ import annotations

import itertools
import json
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import edgemoe
from edgemoe.apply.streamed import apply_streamed
from edgemoe.errors import CheckpointError
from edgemoe.models import load_model
from edgemoe.models.checkpoint import Checkpoint
from edgemoe.models.loading import finite_chunks, refuse_not_finite
from edgemoe.models.tiny import write_tiny_checkpoint
from edgemoe.plans.keep_all import keep_all

if TYPE_CHECKING:
    from collections.abc import Callable
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


@pytest.mark.parametrize("road", ["whole", "streamed"])
@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.1.mlp.gate.e_score_correction_bias"]
)
def test_what_a_plan_does_not_touch_is_not_copied_either(
    tmp_path: Path, name: str, road: str
) -> None:
    path = write_tiny_checkpoint("glm4_moe", tmp_path / "moe", dtype=torch.bfloat16)
    tensors = load_file(path / "model.safetensors")
    tensors[name].view(-1)[-1] = float("nan")
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    plan = keep_all(Checkpoint(path).shape)
    roads: dict[str, Callable[[], object]] = {
        "whole": lambda: load_model(path),
        "streamed": lambda: apply_streamed(path, plan, tmp_path / "out"),
    }
    with pytest.raises(CheckpointError, match=f"got NaN in {name}"):
        roads[road]()
    assert not (tmp_path / "out").exists()


@given(st.binary(max_size=64), st.lists(st.integers(0, 64), max_size=4), st.booleans())
def test_copied_bytes_are_looked_at_wherever_they_are_cut(
    values: bytes, cuts: list[int], spoilt: bool
) -> None:
    finite = torch.tensor(list(values), dtype=torch.float32)
    if spoilt and values:
        finite[len(values) // 2] = float("inf")
    data = finite.numpy().tobytes()
    ends = [0, *sorted(cut for cut in cuts if cut < len(data)), len(data)]
    chunks = [data[begin:end] for begin, end in itertools.pairwise(ends)]
    if spoilt and values:
        with pytest.raises(CheckpointError, match="got infinity in w"):
            list(finite_chunks("w", torch.float32, chunks))
    else:
        assert b"".join(finite_chunks("w", torch.float32, chunks)) == data


def test_large_weights_are_finite() -> None:
    refuse_not_finite("w", torch.full((1000,), torch.finfo(torch.float32).max))
    refuse_not_finite("w", torch.full((4,), torch.finfo(torch.float16).max).half())
    refuse_not_finite("w", torch.empty(3, device="meta"))
