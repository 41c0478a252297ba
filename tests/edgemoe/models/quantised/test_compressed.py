"""compressed-tensors: its own arithmetic, written out here, and its refusals."""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from edgemoe.cli import main
from edgemoe.errors import CheckpointError
from edgemoe.models import load_model
from edgemoe.models.opening import open_streamed
from tests.edgemoe.models.quantised.storing import (
    announce_in_config,
    change_tensors,
    write_both,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

GROUP, BLOCK = 16, (24, 32)
STEM = "model.layers.1.mlp.experts.3.up_proj.weight"


def announcement(kind: str, **weights: Any) -> dict[str, Any]:
    told = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False, **weights}
    group = {"targets": ["Linear"], "weights": told, "input_activations": None, "format": kind}
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*gate$"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.20.1",
    }


def pack(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack rows of numbers of either sign, the last word of a row possibly not full."""
    per_word = 32 // bits
    raised = np.zeros((len(numbers), -(-numbers.shape[1] // per_word) * per_word), np.uint64)
    raised[:, : numbers.shape[1]] = numbers.numpy().astype(np.int64) + 2 ** (bits - 1)
    shifts = np.arange(0, 32, bits, dtype=np.uint64)
    words = (raised.reshape(len(raised), -1, per_word) << shifts).sum(2, dtype=np.uint64)
    return torch.from_numpy(words.astype(np.uint32).view(np.int32))


def spread(scale: torch.Tensor, shape: torch.Size, strategy: str) -> torch.Tensor:
    rows, columns = shape
    if strategy == "block":
        row, column = torch.arange(rows) // BLOCK[0], torch.arange(columns) // BLOCK[1]
        return scale[row][:, column]
    if strategy == "group":
        return scale[:, torch.arange(columns) // GROUP]
    return scale.reshape(-1, 1).expand(rows, columns)


def store(
    name: str,
    weight: torch.Tensor,
    *,
    bits: int = 8,
    number: str = "int",
    strategy: str = "channel",
    symmetric: bool = True,
    packed: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    rows, columns = weight.shape
    sizes = {
        "tensor": (1,),
        "channel": (rows, 1),
        "group": (rows, columns // GROUP),
        "block": (-(-rows // BLOCK[0]), -(-columns // BLOCK[1])),
    }
    scale = (torch.rand(sizes[strategy]) * 0.02 + 0.001).to(dtype)
    half = 2 ** (bits - 1)
    if number == "float":
        numbers = (weight.float() * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
    else:
        numbers = torch.randint(-half, half, (rows, columns), dtype=torch.int8)
    parts = {f"{name}_scale": scale}
    values = numbers.to(dtype)
    if not symmetric:
        zeros = torch.randint(-half, half, scale.shape, dtype=torch.int8)
        values = values - spread(zeros, weight.shape, strategy).to(dtype)
        parts[f"{name}_zero_point"] = pack(zeros.T, bits).T if packed else zeros
    if packed:
        parts[f"{name}_packed"] = pack(numbers, bits)
        parts[f"{name}_shape"] = torch.tensor([rows, columns])
    else:
        parts[name] = numbers
    return parts, (values * spread(scale, weight.shape, strategy)).to(torch.bfloat16)


PACKED = "pack-quantized"


@pytest.mark.parametrize(
    ("family", "kind", "made"),
    [
        ("qwen3_moe", PACKED, {"bits": 4, "strategy": "group"}),
        ("deepseek_v3", PACKED, {"bits": 4, "strategy": "channel"}),
        ("glm4_moe", PACKED, {"bits": 4, "strategy": "group", "symmetric": False}),
        ("mixtral", PACKED, {"bits": 8, "strategy": "channel", "symmetric": False}),
        ("minimax_m2", PACKED, {"bits": 8, "strategy": "group", "dtype": torch.float16}),
        ("qwen3_moe", "int-quantized", {"strategy": "channel"}),
        ("mixtral", "naive-quantized", {"strategy": "group", "symmetric": False}),
        ("glm4_moe", "float-quantized", {"number": "float", "strategy": "channel"}),
        ("qwen3_moe", "float-quantized", {"number": "float", "strategy": "tensor"}),
        ("deepseek_v3", "float-quantized", {"number": "float", "strategy": "block"}),
    ],
)
def test_weights_are_read_exactly(
    family: str, kind: str, made: dict[str, Any], tmp_path: Path, check_same: Any
) -> None:
    strategy = made["strategy"]
    told = announcement(
        kind,
        num_bits=made.get("bits", 8),
        type=made.get("number", "int"),
        strategy=strategy,
        symmetric=made.get("symmetric", True),
        group_size=GROUP if strategy == "group" else None,
        block_structure=list(BLOCK) if strategy == "block" else None,
    )
    quantised, plain = write_both(
        family, tmp_path, partial(store, packed=kind == PACKED, **made), told
    )

    assert check_same(quantised, plain) > 50


INT4 = announcement(PACKED, num_bits=4, strategy="group", group_size=GROUP)


@pytest.fixture
def quantised(tmp_path: Path) -> Path:
    made = partial(store, bits=4, strategy="group", packed=True)
    return write_both("glm4_moe", tmp_path, made, INT4)[0]


@pytest.mark.parametrize("read", [load_model, open_streamed])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_scale": None}, f"{STEM}_packed without {STEM}_scale"),
        ({"_shape": None}, f"{STEM}_packed without {STEM}_shape"),
        ({"_scale": torch.ones(32, 3)}, f"{STEM}_scale of type F32"),
        ({"_g_idx": torch.ones(64, dtype=torch.int32)}, f"{STEM}_g_idx, which goes with"),
        ({"_zero_point": torch.ones(4, 4, dtype=torch.int32)}, f"{STEM}_zero_point, which"),
        ({"_global_scale": torch.ones(1)}, f"{STEM}_global_scale, which goes with"),
        ({"": torch.ones(32, 64, dtype=torch.bfloat16)}, "twice, plain and quantised"),
    ],
)
def test_packed_numbers_are_not_used_without_their_parts(
    quantised: Path,
    read: Callable[[Path], object],
    changes: dict[str, torch.Tensor | None],
    message: str,
) -> None:
    change_tensors(quantised, {f"{STEM}{name}": tensor for name, tensor in changes.items()})

    with pytest.raises(CheckpointError, match=message):
        read(quantised)


def test_another_shape_than_the_headers_tell_is_refused(quantised: Path) -> None:
    change_tensors(quantised, {f"{STEM}_shape": torch.tensor([32, 63])})

    with pytest.raises(CheckpointError, match=r"shape \[32, 64\], stored as \[32, 63\]"):
        load_model(quantised)


@pytest.mark.parametrize(
    "announce",
    [
        {**INT4, "format": "nvfp4-pack-quantized"},
        {**INT4, "format": "mixed-precision"},
        {**INT4, "format": "marlin-24"},
        {**INT4, "sparsity_config": {"format": "sparse-24-bitmask"}},
        {**INT4, "transform_config": {"config_groups": {"u": {}}}},
        {**INT4, "quantization_status": "frozen"},
        {**INT4, "config_groups": {}},
        {**INT4, "rotation": 1},
        announcement(PACKED, num_bits=3, strategy="group", group_size=GROUP),
        announcement(PACKED, num_bits=4, strategy="tensor_group", group_size=GROUP),
        announcement(PACKED, num_bits=4, strategy="group", group_size=GROUP, symmetric=False),
        announcement("float-quantized", num_bits=4, type="float", strategy="tensor"),
        {
            **INT4,
            "config_groups": {
                **INT4["config_groups"],
                "group_1": announcement(PACKED, strategy="channel")["config_groups"]["group_0"],
            },
        },
    ],
)
def test_other_announcements_are_refused_by_name(
    quantised: Path, announce: dict[str, Any]
) -> None:
    announce_in_config(quantised, announce)

    with pytest.raises(CheckpointError, match="a quantised form that edgemoe reads, got"):
        load_model(quantised)


def test_inspect_counts_numbers_and_not_words(quantised: Path) -> None:
    found, wanted = (
        json.loads(CliRunner().invoke(main, ["inspect", str(path), "--json"]).output)
        for path in (quantised, quantised.parent / "plain")
    )

    assert "int4 of compressed-tensors with scales by groups of 16" in found["stored"]
    for name in ("parameters", "experts_per_layer", "expert_intermediate_size"):
        assert found[name] == wanted[name]
