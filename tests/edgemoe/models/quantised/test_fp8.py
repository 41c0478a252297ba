"""FP8 checkpoints: exactly what transformers makes of them, or refused by name."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, _dequantize_fp8_weight

from edgemoe.cli import main
from edgemoe.errors import CheckpointError
from edgemoe.models import load_model, opening
from edgemoe.models.checkpoint import Checkpoint
from edgemoe.models.opening import open_streamed
from edgemoe.models.quantised.decoding import scaled
from tests.edgemoe.models.quantised.storing import (
    announce_in_config,
    change_tensors,
    fp8_parts,
    write_both,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

FP8: dict[str, Any] = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
BLOCK = (24, 32)
BLOCKS = {**FP8, "weight_block_size": list(BLOCK), "modules_to_not_convert": ["lm_head"]}
MODELOPT = {
    "producer": {"name": "modelopt", "version": "0.33"},
    "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"},
}
REFUSED = "must hold plain weights or a quantised form that edgemoe reads, got .*"
FAMILIES = ["deepseek_v3", "qwen3_moe", "minimax_m2", "glm4_moe", "mixtral"]


def by_block(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    shape = tuple(-(-size // side) for size, side in zip(weight.shape, BLOCK, strict=True))
    parts, scale = fp8_parts(name, weight, shape)
    # transformers' rule for loading takes blocks that fill a weight; that of training any.
    meant = _dequantize_fp8_weight(parts[name], scale, list(BLOCK), torch.float32)
    return {**parts, f"{name}_scale_inv": scale}, meant.to(torch.bfloat16)


def by_channel(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    parts, scale = fp8_parts(name, weight, (weight.shape[0], 1))
    meant = Fp8Dequantize(None)._dequantize_one(parts[name], scale, torch.bfloat16)
    return {**parts, f"{name}_scale_inv": scale}, meant


def by_tensor(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    parts, scale = fp8_parts(name, weight, ())
    meant = Fp8Dequantize(None)._dequantize_one(parts[name], scale[None, None], torch.bfloat16)
    stem = name.removesuffix("weight")
    extra = {f"{stem}input_scale": torch.tensor(0.5)}
    if stem.endswith("k_proj."):
        extra[f"{stem}k_scale"] = torch.tensor(1.0)
    return {**parts, f"{name}_scale": scale, **extra}, meant


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_are_read_exactly(family: str, tmp_path: Path, check_same: Any) -> None:
    quantised, plain = write_both(family, tmp_path, by_block, BLOCKS)

    assert check_same(quantised, plain) > 50


@pytest.mark.parametrize("store", [by_channel, by_tensor])
def test_channels_and_tensors_are_read_exactly(
    store: Any, tmp_path: Path, check_same: Any
) -> None:
    quantised, plain = write_both("qwen3_moe", tmp_path, store, FP8)

    assert check_same(quantised, plain) > 50


def test_modelopt_is_read_and_unused_scales_are_told(
    tmp_path: Path, check_same: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "edgemoe.models")
    beside = "hf_quant_config.json"
    quantised, plain = write_both("mixtral", tmp_path, by_tensor, MODELOPT, beside=beside)

    assert check_same(quantised, plain) > 50
    assert "fp8 e4m3 with scales by tensor (ModelOpt) are read as bfloat16" in caplog.text
    assert f"without {beside}" in caplog.text
    assert "scales of activations have no effect here" in caplog.text


@pytest.mark.parametrize("shape", [(576, 320), (128, 128), (160, 7), (1, 300)])
def test_blocks_of_128_reach_over_the_edges(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape).mul(50).to(torch.float8_e4m3fn)
    scale = torch.rand(-(-shape[0] // 128), -(-shape[1] // 128))
    settings = {"span": "block", "block": (128, 128), "in_scale_type": False}

    found = scaled({"weight": weight, "scale": scale}, settings, torch.bfloat16)

    for row in range(0, shape[0], 37):
        for column in range(shape[1]):
            number = weight[row, column].float() * scale[row // 128, column // 128]
            assert found[row, column] == number.bfloat16()


@pytest.fixture
def quantised(tmp_path: Path) -> Path:
    return write_both("glm4_moe", tmp_path, by_block, BLOCKS)[0]


EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.mark.parametrize(
    "read", [load_model, open_streamed, lambda path: Checkpoint(path).left_out]
)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{EXPERT}_scale_inv": None}, f"{EXPERT} without {EXPERT}_scale_inv"),
        (
            {f"{EXPERT}_scale_inv": torch.ones(1, 1)},
            f"{EXPERT}_scale_inv of type F32 and shape",
        ),
        ({f"{EXPERT}_scale_inv": torch.ones(2, 2, dtype=torch.int32)}, "of type I32"),
        ({EXPERT: torch.ones(32, 64, dtype=torch.bfloat16)}, f"{EXPERT}_scale_inv, which goes"),
        ({EXPERT: torch.ones(32, 64, dtype=torch.int8)}, "stored as int8"),
        ({EXPERT: torch.ones(32, 64).to(torch.float8_e5m2)}, "stored as float8_e5m2"),
        ({f"{EXPERT}_scale_2": torch.ones(1)}, f"{EXPERT}_scale_2, which goes with"),
    ],
)
def test_no_weight_is_used_without_its_scales(
    quantised: Path,
    read: Callable[[Path], object],
    changes: dict[str, torch.Tensor | None],
    message: str,
) -> None:
    change_tensors(quantised, changes)

    with pytest.raises(CheckpointError, match=f"(?s){REFUSED}{message}"):
        read(quantised)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"weight_block_size": [128]}, "weight_block_size"),
        ({"weight_block_size": [128, 128]}, f"{EXPERT}_scale_inv|_scale_inv of type"),
        ({"fmt": "e3m4"}, "fmt e3m4"),
        ({"scale_fmt": "log"}, "scale_fmt log"),
        ({"rotation": "hadamard"}, "unknown entry 'rotation'"),
        ({"quant_method": "bitsandbytes"}, "bitsandbytes settings"),
        ({"quant_method": None, "quant_algo": "NVFP4"}, "NVFP4 settings"),
    ],
)
def test_other_announcements_are_refused_by_name(
    quantised: Path, entries: dict[str, Any], message: str
) -> None:
    announce_in_config(quantised, {**BLOCKS, **entries})

    with pytest.raises(CheckpointError, match=REFUSED + message):
        load_model(quantised)


def test_what_nothing_announces_is_refused(quantised: Path) -> None:
    announce_in_config(quantised, {})

    with pytest.raises(CheckpointError, match=REFUSED + "stored as float8_e4m3fn"):
        load_model(quantised)


def test_apply_writes_plain_weights_that_say_nothing_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantised, plain = write_both("qwen3_moe", tmp_path, by_block, BLOCKS)
    (quantised / "hf_quant_config.json").write_text(json.dumps(MODELOPT))
    runs = CliRunner()
    lines = tmp_path / "lines.jsonl"
    texts = [" ".join(f"w{(7 * i + 5 * j) % 90}" for j in range(12)) for i in range(8)]
    lines.write_text(
        "".join(json.dumps({"prompt": t, "completion": "w1"}) + "\n" for t in texts)
    )
    written: list[Path] = []
    for source, limit in ((quantised, 10**9), (plain, 10**9), (quantised, 0)):
        folder = tmp_path / f"of-{len(written)}"
        folder.mkdir()
        monkeypatch.setattr(opening, "default_limit", lambda limit=limit: limit)
        steps = (
            ["calibrate", source, "--task", f"a={lines}", "-o", folder / "stats"],
            ["prune", source, "--stats", folder / "stats", "--task", "a", "--method",
             "frequency", "--keep", "0.5", "-o", folder / "plan.json"],
            ["apply", source, "--plan", folder / "plan.json", "-o", folder / "out"],
        )  # fmt: skip
        for step in steps:
            result = runs.invoke(main, [str(part) for part in step])
            assert result.exit_code == 0, result.output
        written.append(folder / "out")

    whole, reference, streamed = (load_file(path / "model.safetensors") for path in written)
    assert whole.keys() == streamed.keys() == reference.keys()
    for name, tensor in reference.items():
        assert torch.equal(whole[name], tensor)
        assert torch.equal(streamed[name], tensor)
    for path in (written[0], written[2]):
        assert "quantization_config" not in json.loads((path / "config.json").read_text())
        assert not (path / "hf_quant_config.json").exists()


def test_inspect_tells_what_is_stored_and_what_is_read(tmp_path: Path) -> None:
    quantised, plain = write_both("qwen3_moe", tmp_path, by_block, BLOCKS)

    found, wanted = (
        json.loads(CliRunner().invoke(main, ["inspect", str(path), "--json"]).output)
        for path in (quantised, plain)
    )

    assert "fp8 e4m3 with block scales 24x32, read as bfloat16" in found["stored"]
    assert found["dtypes"] == ["BF16", "F32", "F8_E4M3"]
    assert found["weight_bytes"] < wanted["weight_bytes"]
    for name in ("parameters", "experts_per_layer", "expert_intermediate_size", "kind"):
        assert found[name] == wanted[name]
