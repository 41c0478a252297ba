"""A written checkpoint has all that lies beside a source's weights, and no code."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from edgemoe.apply.streamed import apply_streamed
from edgemoe.models import load_model, save_model
from edgemoe.models.checkpoint import Checkpoint
from edgemoe.models.config.companions import copy_companions
from edgemoe.models.tiny import write_tiny_checkpoint
from edgemoe.plans.keep_all import keep_all

if TYPE_CHECKING:
    from pathlib import Path

KEPT = {
    "README.md", "LICENSE", "additional_chat_templates/rag.jinja", "chat_template.jinja",
    "preprocessor_config.json", "spiece.model", "tekken.json", "tokenizer.tiktoken",
    "vocab.v2.txt",
}  # fmt: skip
LEFT = {
    ".gitattributes", "consolidated.pth", "hf_quant_config.json", "modeling_x.py",
    "model.onnx", "pytorch_model.bin.index.json", "other.safetensors.index.json",
}  # fmt: skip


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = write_tiny_checkpoint("deepseek_v3", tmp_path / "source")
    for name in KEPT | LEFT:
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text("{}")
    content = json.loads((path / "config.json").read_bytes())
    content["auto_map"] = {"AutoModelForCausalLM": "modeling_x.XForCausalLM"}
    (path / "config.json").write_text(json.dumps(content))
    return path


def names(path: Path) -> set[str]:
    return {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}


@pytest.mark.parametrize("road", ["whole", "streamed"])
def test_plain_transformers_opens_what_is_written(
    source: Path, tmp_path: Path, road: str
) -> None:
    out = tmp_path / road
    checkpoint = Checkpoint(source)
    if road == "whole":
        out.mkdir()
        save_model(load_model(checkpoint), out, source=source)
    else:
        plan = replace(keep_all(checkpoint.shape), checkpoint_sha256=checkpoint.sha256)
        apply_streamed(checkpoint, plan, out)
    assert names(out) >= KEPT
    assert not names(out) & LEFT
    assert "auto_map" not in json.loads((out / "config.json").read_bytes())
    # Its own class, whatever is trusted: nothing of the source's code is asked for.
    AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)


def test_links_to_elsewhere_are_not_followed_and_those_of_a_cache_are(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "secret").write_text("secret")
    repository = tmp_path / "models--me--moe"
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "blobs" / "ab").write_text("words")
    (snapshot / "vocab.txt").symlink_to("../../blobs/ab")
    (snapshot / "notes.txt").symlink_to(tmp_path / "secret")
    (tmp_path / "out").mkdir()
    with caplog.at_level(logging.INFO):
        copy_companions(snapshot, tmp_path / "out")
    assert names(tmp_path / "out") == {"vocab.txt"}
    assert (tmp_path / "out" / "vocab.txt").read_text() == "words"
    assert not (tmp_path / "out" / "vocab.txt").is_symlink()
    assert "links to elsewhere" in caplog.text
    assert "notes.txt" in caplog.text


def test_settings_that_name_code_are_copied_without_and_vocabularies_as_they_are(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = {"auto_map": {"AutoTokenizer": ["tokenization_x.XTokenizer", None]}}
    part = {"image_processor": {"auto_map": {"AutoImageProcessor": "x.X"}, "size": 3}}
    vocabulary = '{"auto_map":  7, "w":8}'
    (source / "tokenizer_config.json").write_text(
        json.dumps(own | {"tokenizer_class": "XTokenizer"})
    )
    (source / "processor_config.json").write_text(json.dumps(part))
    (source / "vocab.json").write_text(vocabulary)
    (source / "preprocessor_config.json").write_text('{"auto_map": {"a": 1}, "auto_map"')
    out = tmp_path / "out"
    out.mkdir()
    with caplog.at_level(logging.INFO):
        copy_companions(source, out)
    found = json.loads((out / "tokenizer_config.json").read_bytes())
    assert found == {"tokenizer_class": "XTokenizer"}
    assert json.loads((out / "processor_config.json").read_bytes()) == {
        "image_processor": {"size": 3}
    }
    assert (out / "vocab.json").read_text() == vocabulary
    # What is no JSON is none of ours to mend.
    assert "auto_map" in (out / "preprocessor_config.json").read_text()
    assert "left out of processor_config.json, tokenizer_config.json" in caplog.text
    words = AutoTokenizer.from_pretrained(out, trust_remote_code=True)("w3 w5")
    assert words["input_ids"] == [3, 5]
