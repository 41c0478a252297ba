"""Decoder layers one at a time equal the layers of the model that is loaded whole."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from edgemoe.apply.in_memory import apply_plan
from edgemoe.errors import CheckpointError
from edgemoe.models import FAMILIES as ALL
from edgemoe.models import load_model, save_model
from edgemoe.models.opening import open_streamed
from edgemoe.models.tiny import write_tiny_checkpoint
from edgemoe.prune import LayerPlan, MergedExpert, Plan

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

FAMILIES = ("glm4_moe", "mixtral", "qwen2_moe")


def assert_same_tensors(path: Path, dtype: torch.dtype) -> None:
    """Compare values, types and layout in memory of all that a decoder has."""
    whole = load_model(path, dtype)
    skeleton = open_streamed(path, dtype).skeleton
    skeleton.load_outer()
    expected = whole.model.state_dict()
    compared = set()
    for index in range(len(skeleton.layers)):
        with skeleton.layer(index):
            for name, tensor in skeleton.layer_tensors(index).items():
                assert tensor.dtype == expected[name].dtype, name
                assert tensor.stride() == expected[name].stride(), name
                assert torch.equal(tensor, expected[name]), name
                compared.add(name)
        assert all(tensor.is_meta for tensor in skeleton.layer_tensors(index).values())
    for name, tensor in skeleton.model.state_dict().items():
        if not tensor.is_meta:
            assert torch.equal(tensor, expected[name]), name
            compared.add(name)
    assert set(expected) - compared <= {"lm_head.weight"}
    buffers = dict(whole.model.named_buffers())
    for name, buffer in skeleton.model.named_non_persistent_buffers():
        assert torch.equal(buffer, buffers[name]), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_layer_is_what_loading_the_model_gives(
    make_checkpoint: Callable[..., Path], family: str, dtype: torch.dtype
) -> None:
    path = make_checkpoint(family, dtype=torch.bfloat16, max_shard_size="30KB")
    assert len(list(path.glob("*.safetensors"))) > 2

    assert_same_tensors(path, dtype)


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=() if name == "zaya" else pytest.mark.slow) for name in ALL],
)
def test_the_model_has_what_the_file_holds(family: str, tmp_path: Path) -> None:
    """No tensor keeps the value that its class begins with, whole or streamed."""
    write_tiny_checkpoint(family, tmp_path)
    file = tmp_path / "model.safetensors"
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: (tensor + 0.01 * torch.rand(tensor.shape, generator=generator)).to(tensor.dtype)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in load_file(file).items()
    }
    save_file(tensors, file, {"format": "pt"})

    found = load_model(tmp_path).model.state_dict()
    same = [name for name, tensor in found.items() if name in tensors]
    assert same or family.startswith("inkling2")  # its files have other names
    for name in same:
        assert torch.equal(found[name], tensors[name].to(found[name].dtype)), name
    assert_same_tensors(tmp_path, torch.float32)


def test_ragged_and_tied_checkpoints_too(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    tied = make_checkpoint("qwen2_moe", tie_word_embeddings=True)
    assert_same_tensors(tied, torch.float32)
    model = load_model(tied)
    kept = (4, 6)
    layers = tuple(
        LayerPlan(
            layer=layer.index,
            experts=tuple(MergedExpert(members=(expert,)) for expert in range(count)),
        )
        for layer, count in zip(model.layers, kept, strict=True)
    )
    (tmp_path / "ragged").mkdir()
    save_model(apply_plan(model, Plan(method="random", layers=layers)), tmp_path / "ragged")

    assert_same_tensors(tmp_path / "ragged", torch.float32)
    assert open_streamed(tmp_path / "ragged").moe.experts_per_layer == kept


def spoil(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    file = path / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def test_what_does_not_fit_is_refused_from_the_headers(
    make_checkpoint: Callable[..., Path],
) -> None:
    expert = "model.layers.2.block_sparse_moe.experts.5.w1.weight"
    norm = "model.layers.1.input_layernorm.weight"
    for name, change in {
        norm: lambda tensors: tensors.pop(norm),
        expert: lambda tensors: tensors.update({expert: torch.zeros(3, 3)}),
        "model.norm.weight": lambda tensors: tensors.update(
            {"model.norm.weight": torch.zeros(3)}
        ),
    }.items():
        path = make_checkpoint("mixtral")
        spoil(path, change)
        with pytest.raises(CheckpointError, match="must fit its config"):
            open_streamed(path)
        assert name in load_file(path / "model.safetensors") or name == norm
    path = make_checkpoint("mixtral")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "num_local_experts": 16}))
    with pytest.raises(CheckpointError, match="of another shape"):
        open_streamed(path)
