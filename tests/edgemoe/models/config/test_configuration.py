"""config.json: its family, and nothing that chooses code."""

from __future__ import annotations

import json
import socket
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from edgemoe.errors import CheckpointError, EdgemoeError, FamilyError
from edgemoe.evaluate.subject import load_dense
from edgemoe.models import FAMILIES, load_model
from edgemoe.models.checkpoint import Checkpoint
from edgemoe.models.opening import open_streamed
from edgemoe.models.registry import find_family

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

KERNEL = "kernels-community/flash-attn3"
CODE: dict[str, Any] = {
    "_attn_implementation": KERNEL,
    "attn_implementation": KERNEL,
    "auto_map": {"AutoModelForCausalLM": "somebody/code--modeling.Model"},
    "experts_implementation": "kernels-community/megablocks",
    "kernel_config": {"kernel_mapping": {"RMSNorm": "kernels-community/norms:RMSNorm"}},
    "use_kernels": True,
}


def set_entries(path: Path, **entries: Any) -> None:
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a checkpoint must not lead to a request")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


@pytest.mark.usefixtures("offline")
def test_config_json_never_chooses_code(
    make_checkpoint: Callable[..., Path],
    token_ids: torch.Tensor,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = make_checkpoint("glm4_moe")
    before = load_model(path).model(token_ids).logits
    set_entries(path, **CODE, _attn_implementation_autoset=True)
    caplog.set_level("INFO", "edgemoe.models")

    opened = Checkpoint(path)
    model = load_model(opened)
    open_streamed(path)

    assert torch.equal(model.model(token_ids).logits, before)
    assert opened.configuration.dropped == tuple(sorted(CODE))
    assert not set(CODE) & set(opened.config.to_dict())
    assert "may not choose the code that runs" in caplog.text
    assert "kernels" not in sys.modules


@pytest.mark.usefixtures("offline")
def test_nor_does_that_of_a_dense_model_or_of_a_part(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 8, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_hidden_layers": 1, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(tmp_path)
    set_entries(tmp_path, **CODE)
    load_dense(tmp_path)
    assert "kernels" not in sys.modules

    part = {"model_type": "mixtral", "attn_implementation": KERNEL, "hidden_size": 64}
    set_entries(tmp_path, model_type="llava", text_config=part)

    found = Checkpoint(tmp_path)

    assert "text_config.attn_implementation" in found.configuration.dropped
    assert (found.family.model_type, found.wrapper) == ("mixtral", "llava")
    assert found.config.hidden_size == 64


@pytest.mark.parametrize(
    "model_type", ["blip-2", "nemotron_h_omni", "encoder-decoder", "t5", ""]
)
def test_a_type_without_a_language_model_is_refused_by_name(model_type: str) -> None:
    with pytest.raises(FamilyError, match=f"got '{model_type}': "):
        find_family(model_type)


def family_or_refusal(name: str) -> str:
    try:
        return find_family(name).model_type
    except FamilyError as error:
        return str(error)


@pytest.mark.slow
def test_every_type_of_transformers_is_found_or_refused_by_name() -> None:
    found = {name: family_or_refusal(name) for name in CONFIG_MAPPING_NAMES}

    families = {name for name, answer in found.items() if answer == name}
    assert families >= set(FAMILIES)
    for name in found.keys() - families:
        assert f"got {name!r}: " in found[name]
        assert len(found[name]) < 600


@pytest.mark.parametrize(
    ("model_type", "meant"),
    [
        ("qwen3-moe", "qwen3_moe"),
        ("Mixtral", "mixtral"),
        ("deepseek_v3.2", "deepseek_v32"),
        ("glm4moe", "glm4_moe"),
        ("gemma4txt", "gemma4_text"),
    ],
)
def test_a_name_that_is_nearly_a_family_gets_the_suggestion(
    model_type: str, meant: str
) -> None:
    with pytest.raises(FamilyError, match=rf"Did you mean {meant}\? ") as raised:
        find_family(model_type)

    assert "afmoe" not in str(raised.value)


@pytest.mark.parametrize(
    "model_type",
    [None, 7, "", [], {}, ["mixtral"], {"mixtral": 1}, "x" * 5000, "mixtral\x1b[2J"],
)
def test_what_is_no_name_is_refused_as_it_stands(tmp_path: Path, model_type: object) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))

    with pytest.raises(FamilyError, match="must be one with experts") as raised:
        load_model(tmp_path)

    assert len(str(raised.value)) < 600
    assert "\x1b" not in str(raised.value)


@pytest.mark.parametrize(
    "text_config", [None, 7, [], {"model_type": None}, {"model_type": []}, {"model_type": "x"}]
)
def test_a_language_part_that_is_none_is_refused(tmp_path: Path, text_config: object) -> None:
    content = {"model_type": "mistral3", "text_config": text_config}
    (tmp_path / "config.json").write_text(json.dumps(content))

    with pytest.raises(EdgemoeError):
        load_model(tmp_path)


def test_the_family_of_a_decoder_with_an_encoder_is_refused(tmp_path: Path) -> None:
    parts = {"encoder": {"model_type": "bert"}, "decoder": {"model_type": "mixtral"}}
    content = {"model_type": "encoder-decoder", **parts}
    (tmp_path / "config.json").write_text(json.dumps(content))

    with pytest.raises((FamilyError, CheckpointError)):
        load_model(tmp_path)


@pytest.mark.parametrize("with_weights", [False, True])
def test_adapters_are_never_taken_for_a_model(
    make_checkpoint: Callable[..., Path], with_weights: bool
) -> None:
    path = make_checkpoint("glm4_moe")
    adapter = {"base_model_name_or_path": "somebody/model", "peft_type": "LORA"}
    (path / "adapter_config.json").write_text(json.dumps(adapter))
    message = "without an adapter, got adapter_config.json beside them"
    if not with_weights:
        (path / "model.safetensors").unlink()
        message = "got an adapter of 'somebody/model' alone"

    for read in (load_model, open_streamed, load_dense, Checkpoint):
        with pytest.raises(CheckpointError, match=message):
            read(path)
