from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from edgemoe.errors import CheckpointError, OutputError
from edgemoe.models import adapt_model, load_model, read_shape, save_model
from edgemoe.models.weights.fingerprint import fingerprint_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from edgemoe.models import MoeModel

FAMILIES = ("glm4_moe", "mixtral", "qwen2_moe")


def keep(model: MoeModel, counts: list[int]) -> None:
    for layer, count in zip(model.layers, counts, strict=True):
        layer.keep(range(count))


def save(model: MoeModel, path: Path, **kwargs: Any) -> Path:
    path.mkdir()
    save_model(model, path, **kwargs)
    return path


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_counts_give_a_checkpoint_that_transformers_opens(
    make_checkpoint: Callable[..., Path],
    token_ids: torch.Tensor,
    tmp_path: Path,
    family: str,
) -> None:
    model = load_model(make_checkpoint(family))
    keep(model, [5] * len(model.layers))
    expected = model.model(token_ids).logits

    path = save(model, tmp_path / "saved", provenance={"plan_sha256": "ab"})

    stock = AutoModelForCausalLM.from_pretrained(path).eval()
    weights = model.model.state_dict()
    assert stock.state_dict().keys() == weights.keys()
    for name, weight in stock.state_dict().items():
        assert torch.equal(weight, weights[name]), name
    # Products of the same weights may round otherwise where memory begins at another address.
    torch.testing.assert_close(stock(token_ids).logits, expected, rtol=1e-5, atol=1e-5)
    for name in model.count_entries:
        assert getattr(stock.config, name) == 5
    assert not (path / "edgemoe.json").exists()
    assert (path / "tokenizer.json").exists()
    again = load_model(path)
    assert torch.equal(again.model(token_ids).logits, expected)
    assert again.provenance == {"plan_sha256": "ab"}


@pytest.mark.parametrize("family", FAMILIES)
def test_different_counts_are_opened_by_edgemoe_and_refused_by_transformers(
    make_checkpoint: Callable[..., Path],
    token_ids: torch.Tensor,
    tmp_path: Path,
    family: str,
) -> None:
    model = load_model(make_checkpoint(family))
    counts = [7, 3, 4][: len(model.layers)]
    keep(model, counts)
    expected = model.model(token_ids).logits

    path = save(model, tmp_path / "saved")

    again = load_model(path)
    assert again.experts_per_layer == tuple(counts)
    assert torch.equal(again.model(token_ids).logits, expected)
    assert type(again.model).__module__.startswith("transformers.")
    assert read_shape(path) == again.shape == model.shape
    assert json.loads((path / "edgemoe.json").read_text())["experts_per_layer"] == counts
    config = json.loads((path / "config.json").read_text())
    assert config["edgemoe"]["experts_per_layer"] == counts
    with pytest.raises(RuntimeError):
        AutoModelForCausalLM.from_pretrained(path)
    # And what was ragged once can be written again.
    second = save(again, tmp_path / "second")
    assert load_model(second).sha256 == again.sha256


def test_saving_what_was_loaded_changes_no_tensor_and_twice_gives_the_same_bytes(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    path = make_checkpoint("glm4_moe", dtype=torch.bfloat16)

    first = save(load_model(path), tmp_path / "first")
    second = save(load_model(path), tmp_path / "second")

    before, after = (load_file(place / "model.safetensors") for place in (path, first))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor)
        assert after[name].dtype == tensor.dtype
    assert json.loads((first / "config.json").read_text())["dtype"] == "bfloat16"
    files = sorted(file.name for file in first.iterdir())
    assert files == sorted(file.name for file in second.iterdir())
    for name in files:
        assert (first / name).read_bytes() == (second / name).read_bytes()
    assert len({file.stat().st_mode for file in first.iterdir()}) == 1


def test_tied_embeddings_and_generation_settings_survive(
    make_checkpoint: Callable[..., Path], token_ids: torch.Tensor, tmp_path: Path
) -> None:
    path = make_checkpoint("qwen2_moe", tie_word_embeddings=True)
    # Settings that transformers reads, but would refuse to write.
    settings = {"temperature": 0.2, "do_sample": False, "eos_token_id": [2, 5]}
    (path / "generation_config.json").write_text(json.dumps(settings))
    (path / "LICENSE").write_text("Apache")
    model = load_model(path)

    saved = save(model, tmp_path / "saved")

    assert json.loads((saved / "generation_config.json").read_text()) == settings
    assert (saved / "LICENSE").read_text() == "Apache"
    assert "lm_head.weight" not in load_file(saved / "model.safetensors")
    again = load_model(saved)
    assert torch.equal(again.model(token_ids).logits, model.model(token_ids).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tied_embeddings_are_stored_once(
    make_checkpoint: Callable[..., Path], tmp_path: Path, dtype: torch.dtype
) -> None:
    source = make_checkpoint("glm4_moe", dtype=dtype, tie_word_embeddings=True)
    path = save(load_model(source), tmp_path / "saved")
    names = [set(load_file(folder / "model.safetensors")) for folder in (source, path)]
    assert names[0] == names[1]
    assert "lm_head.weight" not in names[1]


def test_files_beside_the_weights_do_not_change_the_checkpoint(
    make_checkpoint: Callable[..., Path],
) -> None:
    path = make_checkpoint("mixtral")
    before = fingerprint_checkpoint(path)
    save_file({"x": torch.zeros(2)}, path / "stats.safetensors")
    assert fingerprint_checkpoint(path) == before == load_model(path).sha256
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "rope_theta": 5.0}))
    assert fingerprint_checkpoint(path) != before


def test_a_model_in_memory_has_a_fingerprint_and_can_be_saved(
    make_model: Callable[..., Any], tmp_path: Path
) -> None:
    model = adapt_model(make_model("mixtral"))
    assert model.sha256 == adapt_model(make_model("mixtral")).sha256
    assert model.sha256 != adapt_model(make_model("mixtral", seed=1)).sha256

    saved = save(model, tmp_path / "saved")

    assert load_model(saved).shape == model.shape


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "other"},
        {"version": 2},
        {"experts_per_layer": [7]},
        {"experts_per_layer": [7, 4]},
        {"experts_per_layer": [7, 2]},
        {"experts_per_layer": "many"},
        {"moe_layers": [0, 1]},
        {"comment": "mine"},
    ],
)
def test_an_edited_note_is_refused(
    make_checkpoint: Callable[..., Path], tmp_path: Path, changes: dict[str, Any]
) -> None:
    model = load_model(make_checkpoint("glm4_moe"))
    keep(model, [7, 3])
    path = save(model, tmp_path / "saved")
    file = path / "edgemoe.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    with pytest.raises(CheckpointError):
        load_model(path)


def test_a_full_disk_is_one_clear_error(
    make_model: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors import SafetensorError

    def refuse(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    model = adapt_model(make_model("mixtral"))
    monkeypatch.setattr(type(model.model), "save_pretrained", refuse)

    with pytest.raises(OutputError, match="No space left"):
        save_model(model, tmp_path)
