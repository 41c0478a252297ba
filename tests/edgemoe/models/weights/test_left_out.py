"""What a checkpoint holds besides its language model: said, or refused by name."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from edgemoe.cli import main
from edgemoe.errors import CheckpointError
from edgemoe.evaluate.subject import load_dense
from edgemoe.models import load_model
from edgemoe.models.checkpoint import Checkpoint
from edgemoe.models.opening import open_streamed
from edgemoe.models.weights.name_words import COMPUTED, PREDICTING, SEEING, UNKNOWN

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

LAYER = "model.layers.1"
EXPERT = f"{LAYER}.mlp.experts.3.up_proj.weight"
QUANTISED = "must hold plain weights or a quantised form"
PLAIN = r"has no place for and would be wrong without"


def change(path: Path, tensors: Mapping[str, torch.Tensor | None]) -> None:
    file = path / "model.safetensors"
    found = {**load_file(file), **tensors}
    save_file({k: v for k, v in found.items() if v is not None}, file, {"format": "pt"})


def set_entries(path: Path, **entries: Any) -> None:
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


@pytest.fixture
def checkpoint(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint("glm4_moe")


@pytest.mark.parametrize(
    "read", [load_model, open_streamed, lambda path: Checkpoint(path).left_out]
)
@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (EXPERT, torch.ones(16, 32).to(torch.float8_e4m3fn), f"{QUANTISED}.*stored as float8"),
        (EXPERT, torch.ones(16, 32, dtype=torch.int8), f"{QUANTISED}.*stored as int8"),
        (f"{EXPERT}_scale", torch.ones(1), QUANTISED),
        (f"{EXPERT}_scale_inv", torch.ones(1, 1), QUANTISED),
        (f"{LAYER}.self_attn.k_proj.qzeros", torch.ones(4, dtype=torch.int32), QUANTISED),
        (f"{LAYER}.self_attn.k_proj.g_idx", torch.ones(4, dtype=torch.int32), QUANTISED),
        ("lm_head.weight_scale", torch.ones(1), QUANTISED),
        (f"{LAYER}.self_attn.o_proj.bias", torch.ones(32), PLAIN),
        (f"{LAYER}.self_attn.sinks", torch.ones(4), PLAIN),
        ("model.norm.bias", torch.ones(32), PLAIN),
        ("model.layers.3.input_layernorm.weight", torch.ones(32), "says 3 layers, .* further"),
    ],
)  # fmt: skip
def test_what_a_part_that_runs_would_need_is_refused(
    checkpoint: Path,
    read: Callable[[Path], object],
    name: str,
    tensor: torch.Tensor,
    message: str,
) -> None:
    change(checkpoint, {name: tensor})

    with pytest.raises(CheckpointError, match=message):
        read(checkpoint)


def test_what_is_left_out_is_counted_and_changes_nothing(
    checkpoint: Path, token_ids: torch.Tensor
) -> None:
    before = load_model(checkpoint).model(token_ids).logits
    extra = {
        "model.visual.blocks.0.attn.qkv.weight": torch.ones(4, 4),
        "model.visual.blocks.0.attn.qkv.bias": torch.ones(4, dtype=torch.bfloat16),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "model.layers.3.eh_proj.weight": torch.ones(4, 8),
        "model.layers.3.input_layernorm.weight": torch.ones(4),
        "mtp.norm.weight": torch.ones(4),
        "value_head.weight": torch.ones(4, 1),
    }
    change(checkpoint, extra)

    opened = Checkpoint(checkpoint)
    after = load_model(opened).model(token_ids).logits
    streamed = Checkpoint(checkpoint)
    open_streamed(streamed)

    assert torch.equal(after, before)
    assert streamed.left_out == opened.left_out
    found = {part.what: (part.tensors, part.nbytes) for part in opened.left_out}
    assert found == {SEEING: (2, 72), COMPUTED: (1, 16), PREDICTING: (3, 160), UNKNOWN: (1, 16)}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"num_hidden_layers": 2}, "says 2 layers"),
        ({"num_hidden_layers": 4}, "missing or of another shape"),
        ({"n_routed_experts": 4}, "of another shape"),
        ({"n_routed_experts": 16}, "of another shape"),
        ({"vocab_size": 64}, "of another shape"),
        ({"attention_bias": True}, "missing or of another shape"),
    ],
)
def test_settings_and_weights_must_agree(
    checkpoint: Path, entries: dict[str, Any], message: str
) -> None:
    set_entries(checkpoint, **entries)

    for read in (load_model, open_streamed):
        with pytest.raises(CheckpointError, match=message):
            read(checkpoint)


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        (
            "hf_quant_config.json",
            {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}},
            "announced by hf_quant_config.json with FP8 settings",
        ),
        ("quantize_config.json", {"bits": 4}, "announced by quantize_config.json with 4 "),
        ("quant_config.json", {"w_bit": 4}, "announced by quant_config.json with 4 "),
    ],
)
def test_what_announces_quantised_weights_is_named(
    checkpoint: Path,
    caplog: pytest.LogCaptureFixture,
    file: str,
    content: dict[str, Any],
    told: str,
) -> None:
    (checkpoint / file).write_text(json.dumps(content))
    caplog.set_level("INFO", "edgemoe.models")
    load_model(checkpoint)
    assert f"in spite of {file}" in caplog.text

    change(checkpoint, {EXPERT: torch.ones(16, 32).to(torch.float8_e5m2)})

    with pytest.raises(CheckpointError, match=told):
        load_model(checkpoint)


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("quantization_config", {"quant_method": "fp8"}),
        ("compression_config", {"format": "pack-quantized"}),
        ("quantization", {"group_size": 64, "bits": 4}),
    ],
)
def test_what_config_json_announces_is_refused_by_name(
    checkpoint: Path, entry: str, value: dict[str, Any]
) -> None:
    set_entries(checkpoint, **{entry: value})

    with pytest.raises(CheckpointError, match=f"got {entry} of config.json with"):
        load_model(checkpoint)


def test_dense_models_are_judged_too(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 8, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_hidden_layers": 1, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(tmp_path)
    load_dense(tmp_path)

    change(tmp_path, {"model.layers.0.self_attn.q_proj.bias": torch.ones(16)})

    with pytest.raises(CheckpointError, match=PLAIN):
        load_dense(tmp_path)


def test_commands_say_once_what_has_no_effect(checkpoint: Path, tmp_path: Path) -> None:
    change(checkpoint, {"model.visual.proj.weight": torch.ones(4, 4)})
    set_entries(checkpoint, auto_map={"AutoModel": "code.Model"})
    task = tmp_path / "t.jsonl"
    task.write_text("".join(json.dumps({"text": "w3 w4 w5 " * 4}) + "\n" for _ in range(4)))
    command = ["calibrate", str(checkpoint), "--task", f"t={task}", "-o", str(tmp_path / "s")]

    done = CliRunner().invoke(main, command)
    facts = CliRunner().invoke(main, ["inspect", str(checkpoint), "--full", "--json"])

    assert done.exit_code == 0, done.output
    assert done.stderr.count("parts that see (1 tensors, 0.0 MB, such as model.visual") == 1
    assert done.stderr.count("entries are dropped: auto_map.") == 1
    told = json.loads(facts.stdout)
    assert told["left_out"][0]["name"] == SEEING
    assert told["dropped_settings"] == ["auto_map"]
