"""Mxfp4 of gpt-oss: exactly what transformers makes of it, or refused by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from edgemoe.errors import CheckpointError
from edgemoe.models import load_model
from edgemoe.models.opening import open_streamed
from edgemoe.models.quantised.decoding import mxfp4
from tests.edgemoe.models.quantised.storing import change_tensors, write_both

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import numpy as np

MXFP4 = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"],
}
STACK = "model.layers.1.mlp.experts.down_proj"


def store(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    experts, inputs, outputs = weight.shape
    blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
    scales = torch.randint(118, 126, blocks.shape[:-1], dtype=torch.uint8)
    meant = convert_moe_packed_tensors(blocks, scales).to(torch.bfloat16)
    return {f"{name}_blocks": blocks, f"{name}_scales": scales}, meant


@pytest.fixture
def checkpoints(tmp_path: Path) -> tuple[Path, Path]:
    return write_both(
        "gpt_oss", tmp_path, store, MXFP4, chosen=lambda _name, tensor: tensor.dim() == 3
    )


def test_stacks_of_experts_are_read_exactly(
    checkpoints: tuple[Path, Path], check_same: Any
) -> None:
    assert check_same(*checkpoints) == 8


@settings(max_examples=60, deadline=None)
@given(
    arrays.arrays("uint8", (1, 3, 2, 16)),
    # Of 255 the format says that it is no number; transformers overflows to infinity.
    arrays.arrays("uint8", (1, 3, 2), elements=st.integers(0, 254)),
)
def test_every_byte_and_scale_means_what_transformers_says(
    blocks: np.ndarray[Any, Any], scales: np.ndarray[Any, Any]
) -> None:
    parts = {"blocks": torch.from_numpy(blocks[0]), "scales": torch.from_numpy(scales[0])}
    wanted = convert_moe_packed_tensors(torch.from_numpy(blocks), torch.from_numpy(scales))

    found = mxfp4(parts, {}, torch.bfloat16)

    assert torch.equal(found, wanted[0].to(torch.bfloat16))


@pytest.mark.parametrize("read", [load_model, open_streamed])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{STACK}_scales": None}, f"{STACK}_blocks without {STACK}_scales"),
        ({f"{STACK}_blocks": None}, rf"{STACK}(_scales, which goes with|\. )"),
        ({f"{STACK}_scales": torch.ones(8, 64, 2, dtype=torch.uint8)}, "where .* wants"),
        ({f"{STACK}_blocks": torch.ones(8, 64, 1, 8, dtype=torch.uint8)}, "bytes of U8"),
        ({STACK: torch.ones(8, 32, 64, dtype=torch.bfloat16)}, "twice, plain and quantised"),
    ],
)
def test_blocks_are_not_used_without_their_scales(
    checkpoints: tuple[Path, Path],
    read: Callable[[Path], object],
    changes: dict[str, torch.Tensor | None],
    message: str,
) -> None:
    quantised, _ = checkpoints
    change_tensors(quantised, changes)

    with pytest.raises(CheckpointError, match=message):
        read(quantised)
