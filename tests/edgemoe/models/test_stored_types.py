"""Tensors that a plan does not touch are written as they were stored, bit by bit.

Published checkpoints hold most weights in bfloat16 and a few in float32: biases of routers,
decays of recurrent states, norms, by family.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

from edgemoe.apply.streamed import apply_streamed
from edgemoe.models import load_model
from edgemoe.models.checkpoint import Checkpoint
from edgemoe.models.registry import FAMILIES
from edgemoe.models.saving import save_model
from edgemoe.models.tiny import write_tiny_checkpoint
from edgemoe.plans.keep_all import keep_all

if TYPE_CHECKING:
    from pathlib import Path

_FAST = {"minimax_m2", "kimi_linear", "inkling2_text"}


def _is_small(name: str, tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and (
        tensor.ndim == 1 or any(word in name for word in ("bias", "gate.weight", "router"))
    )


@pytest.fixture
def mixed(tmp_path: Path, family: str) -> Path:
    """A bfloat16 checkpoint whose small tensors are float32, with digits beyond bfloat16."""
    path = write_tiny_checkpoint(family, tmp_path / "mixed", dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(path / "model.safetensors")
    for name, tensor in tensors.items():
        if _is_small(name, tensor):
            values = torch.randn(tensor.shape, generator=generator) * 0.02
            if name.endswith("balancing_biases"):
                values[-1] = -1.0  # transformers sets it so, whatever the file says
            tensors[name] = values
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.mark.parametrize(
    "family",
    [f if f in _FAST else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES],
)
def test_an_untouched_tensor_keeps_its_type_and_its_bits(
    mixed: Path, tmp_path: Path, family: str
) -> None:
    del family
    checkpoint = Checkpoint(mixed)
    plan = replace(keep_all(checkpoint.shape), checkpoint_sha256=checkpoint.sha256)
    whole, streamed = tmp_path / "whole", tmp_path / "streamed"
    whole.mkdir()
    save_model(load_model(checkpoint), whole, source=mixed)
    apply_streamed(checkpoint, plan, streamed)
    before = load_file(mixed / "model.safetensors")
    for road in (whole, streamed):
        after = load_file(road / "model.safetensors")
        assert set(after) == set(before)
        unlike = [
            name
            for name, tensor in before.items()
            if after[name].dtype != tensor.dtype or not torch.equal(after[name], tensor)
        ]
        assert not unlike, road.name
        assert json.loads((road / "config.json").read_bytes())["dtype"] == "bfloat16"
