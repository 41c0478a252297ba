"""Sizes against the files that are written."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from safetensors import safe_open

from edgemoe.apply.in_memory import apply_plan
from edgemoe.models.checkpoint import load_model
from edgemoe.models.opening import open_streamed
from edgemoe.models.saving import save_model
from edgemoe.plans.plan import LayerPlan, MergedExpert, Plan
from edgemoe.sweep.sizes import Sizes

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def stored_bytes(folder: Path) -> int:
    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            total += sum(tensors.get_tensor(name).nbytes for name in tensors.keys())  # noqa: SIM118
    return total


@pytest.mark.parametrize(
    ("family", "dtype", "tied"),
    [
        ("mixtral", torch.float32, False),
        ("mixtral", torch.bfloat16, True),
        # With a correction bias that stays in float32.
        ("glm4_moe", torch.bfloat16, False),
    ],
)
def test_sizes_are_those_of_the_checkpoint_that_is_written(
    make_checkpoint: Callable[..., Path],
    tmp_path: Path,
    family: str,
    dtype: torch.dtype,
    tied: bool,
) -> None:
    path = make_checkpoint(family, dtype=dtype, tie_word_embeddings=tied)
    model = load_model(path)
    layers = len(model.layers)
    counts = tuple(range(3, 3 + layers))
    before = Sizes.of(model, (8,) * layers)
    expected = Sizes.of(model, counts)
    assert Sizes.of(open_streamed(path).moe, counts) == expected
    (tmp_path / "whole").mkdir()
    save_model(model, tmp_path / "whole", source=path)
    assert before.checkpoint_bytes == stored_bytes(tmp_path / "whole")

    plan = Plan(
        method="by-hand",
        layers=tuple(
            LayerPlan(
                layer=layer.index,
                experts=tuple(MergedExpert(members=(expert,)) for expert in range(count)),
            )
            for layer, count in zip(model.layers, counts, strict=True)
        ),
    )
    small = apply_plan(model, plan)
    (tmp_path / "small").mkdir()
    save_model(small, tmp_path / "small", source=path)
    assert expected.checkpoint_bytes == stored_bytes(tmp_path / "small")
    assert (before.experts, expected.experts) == (8 * layers, sum(counts))
    # Three matrices of 16 x 32 each.
    assert expected.routed_parameters == sum(counts) * 3 * 16 * 32
