from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from edgemoe.errors import CheckpointError, FamilyError
from edgemoe.models import load_model, load_tokenizer, read_shape
from edgemoe.models.checkpoint import Checkpoint
from edgemoe.models.weights.fingerprint import fingerprint_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

FAMILIES = ("glm4_moe", "mixtral", "qwen2_moe")


@pytest.fixture
def checkpoint(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint("glm4_moe")


@pytest.fixture
def sharded(make_model: Callable[..., Any], tmp_path: Path) -> Path:
    path = tmp_path / "sharded"
    make_model("mixtral").save_pretrained(path, max_shard_size="40KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


def edit_json(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text())
    content.update(changes)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_opens_with_the_logits_of_transformers(
    make_model: Callable[..., Any],
    make_checkpoint: Callable[..., Path],
    token_ids: torch.Tensor,
    family: str,
) -> None:
    path = make_checkpoint(family)

    model = load_model(path)

    assert torch.equal(model.model(token_ids).logits, make_model(family)(token_ids).logits)
    assert type(model.model) is type(make_model(family))
    assert read_shape(path) == model.shape
    assert len(model.sha256) == 64


def test_an_open_checkpoint_is_read_once_and_hands_out_copies(
    checkpoint: Path, tmp_path: Path
) -> None:
    opened = Checkpoint.open(checkpoint)
    assert Checkpoint.open(opened) is opened
    sha256, shape = fingerprint_checkpoint(checkpoint), load_model(checkpoint).shape
    assert opened.shape == shape
    config = opened.config
    config.hidden_size = 1
    assert opened.config.hidden_size != 1

    # What is not read again need not be there again.
    (checkpoint / "config.json").rename(tmp_path / "moved")
    assert load_model(opened).shape == shape
    with pytest.raises(CheckpointError, match=r"must have config\.json"):
        load_model(checkpoint)
    (tmp_path / "moved").rename(checkpoint / "config.json")
    assert load_model(opened).sha256 == opened.sha256 == sha256
    assert opened.max_length == opened.config.max_position_embeddings


def test_shards_are_opened(sharded: Path, make_model: Callable[..., Any]) -> None:
    tokens = torch.tensor([[5, 6, 7]])

    assert torch.equal(
        load_model(sharded).model(tokens).logits, make_model("mixtral")(tokens).logits
    )


def test_the_fingerprint_follows_the_content_not_the_place(
    checkpoint: Path, tmp_path: Path
) -> None:
    first = load_model(checkpoint).sha256
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    assert load_model(copy).sha256 == first

    tensors = load_file(copy / "model.safetensors")
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    assert load_model(copy).sha256 != first


def test_what_is_no_checkpoint_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        load_model(tmp_path / "absent")
    pickle = tmp_path / "model.bin"
    pickle.write_bytes(b"\x80\x02")
    with pytest.raises(CheckpointError, match="Pickles run code"):
        load_model(pickle)
    with pytest.raises(CheckpointError, match=r"must have config\.json"):
        load_model(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(CheckpointError, match="the bundle"):
        load_model(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "\ufeff\x00", '{"model_type": }'])
def test_a_broken_config_is_refused(checkpoint: Path, text: str) -> None:
    (checkpoint / "config.json").write_text(text)

    with pytest.raises(CheckpointError, match=r"config\.json must be a JSON object"):
        load_model(checkpoint)


@pytest.mark.parametrize(
    "changes",
    [{"hidden_size": "wide"}, {"n_routed_experts": -1}, {"num_hidden_layers": None}],
)
def test_a_config_with_impossible_entries_is_refused(
    checkpoint: Path, changes: dict[str, Any]
) -> None:
    edit_json(checkpoint / "config.json", **changes)

    with pytest.raises(CheckpointError):
        load_model(checkpoint)
    with pytest.raises(CheckpointError):
        read_shape(checkpoint)


@pytest.mark.parametrize("model_type", ["llama", "qwen3_vl_moe", None, 7])
def test_an_unknown_family_is_refused_before_weights_are_looked_at(
    checkpoint: Path, model_type: object
) -> None:
    edit_json(checkpoint / "config.json", model_type=model_type)
    (checkpoint / "model.safetensors").unlink()

    with pytest.raises(FamilyError, match=f"got {model_type!r}: .*docs/families"):
        load_model(checkpoint)


def test_quantised_weights_are_refused(checkpoint: Path) -> None:
    edit_json(checkpoint / "config.json", quantization_config={"quant_method": "fp8"})

    with pytest.raises(CheckpointError, match="must hold plain weights"):
        load_model(checkpoint)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_refused(checkpoint: Path, name: str) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / name)

    with pytest.raises(CheckpointError, match=f"must be safetensors, got the pickle {name}"):
        load_model(checkpoint)


def test_absent_weights_are_refused(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()

    with pytest.raises(CheckpointError, match="got neither"):
        load_model(checkpoint)


@pytest.mark.parametrize("left", [0, 4, 100, -1])
def test_truncated_weights_are_refused(checkpoint: Path, left: int) -> None:
    file = checkpoint / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:left])

    with pytest.raises(CheckpointError, match="must be a whole safetensors file"):
        load_model(checkpoint)


def test_an_index_must_agree_with_its_shards(sharded: Path) -> None:
    file = sharded / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    original = dict(index["weight_map"])

    def refused(weight_map: object, match: str) -> None:
        file.write_text(json.dumps({**index, "weight_map": weight_map}))
        with pytest.raises(CheckpointError, match=match):
            load_model(sharded)

    refused({}, "weight_map")
    refused({**original, "lm_head.weight": "../other.safetensors"}, "own directory")
    refused({**original, "lm_head.weight": "pytorch_model.bin"}, "must be safetensors")
    refused({**original, "nothing": next(iter(original.values()))}, "without it")
    refused({**original, "lm_head.weight": "model-9.safetensors"}, "no such file")
    file.write_text(json.dumps(index))
    (sharded / original["lm_head.weight"]).unlink()
    with pytest.raises(CheckpointError, match="no such file"):
        load_model(sharded)


@pytest.mark.parametrize("fault", ["missing", "other_shape", "fewer_experts"])
def test_weights_that_do_not_fit_the_config_are_refused(checkpoint: Path, fault: str) -> None:
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    if fault == "missing":
        del tensors["model.norm.weight"]
    elif fault == "other_shape":
        tensors["model.norm.weight"] = torch.ones(5)
    else:
        tensors = {name: t for name, t in tensors.items() if ".experts.7." not in name}
    save_file(tensors, file, metadata={"format": "pt"})

    with pytest.raises(CheckpointError, match=r"must fit its config\.json"):
        load_model(checkpoint)


def test_the_tokenizer_is_opened_or_missed(checkpoint: Path) -> None:
    assert load_tokenizer(checkpoint).encode("w3 w4").ids == [3, 4]

    (checkpoint / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="must be a tokenizer"):
        load_tokenizer(checkpoint)
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"must have tokenizer\.json"):
        load_tokenizer(checkpoint)


def test_nothing_is_drawn_or_logged(
    checkpoint: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    load_model(checkpoint)

    assert capfd.readouterr() == ("", "")
