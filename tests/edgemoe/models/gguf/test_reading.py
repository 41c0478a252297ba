"""Keys and tensors of a GGUF are honoured, refused by name or listed; broken files refused."""

from __future__ import annotations

import inspect
import random
import struct
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import gguf
import pytest
from tokenizers import Tokenizer

from edgemoe.cli.describe.file import describe
from edgemoe.errors import CheckpointError, EdgemoeError, FamilyError
from edgemoe.models.checkpoint import Checkpoint
from edgemoe.models.gguf.container import Container, read_container
from edgemoe.models.gguf.reading import GgufModel, open_gguf
from tests.edgemoe.models.gguf.writing import tokens, write_gguf

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture(scope="module")
def moe(sources: Callable[..., tuple[Path, Any]], tmp_path_factory: Any) -> Path:
    """A GGUF of a tiny Qwen3-MoE."""
    folder, _ = sources("qwen3_moe", norm_topk_prob=True)
    return write_gguf(folder, tmp_path_factory.mktemp("gguf") / "moe.gguf")


def _with(container: Container, **changes: Any) -> GgufModel:
    return GgufModel(replace(container, metadata={**container.metadata, **changes}))


def _all_keys(architecture: str) -> Iterator[str]:
    """Yield the keys that gguf-py knows for language models."""

    def of(group: Any) -> Iterator[str]:
        for name, value in vars(group).items():
            if inspect.isclass(value):
                yield from of(value)
            elif isinstance(value, str) and not name.startswith("_"):
                yield value

    for group in (gguf.Keys.LLM, gguf.Keys.Attention, gguf.Keys.Rope, gguf.Keys.SSM,
                  gguf.Keys.Tokenizer, gguf.Keys.General, gguf.Keys.Split):  # fmt: skip
        for key in of(group):
            yield key.format(arch=architecture, dense="dense", id=0, name="tool")


@pytest.mark.parametrize("value", [7, 0.625, "strange", [1, 2]], ids=str)
def test_every_key_is_honoured_or_refused_by_name_or_listed(moe: Path, value: object) -> None:
    container = read_container([moe])
    plain = GgufModel(container)
    settings = plain.settings
    keys = [key for key in _all_keys("qwen3moe") if key != "general.architecture"]
    assert len(keys) > 150
    for key in keys:
        try:
            found = _with(container, **{key: value})
            # What says how a file is laid out was obeyed when its header was read.
            laid_out = key.startswith("split.") or key in _NOT_LISTED
            said = found.settings != settings or laid_out or key in found.left_out
        except EdgemoeError as error:
            said = key.rpartition(".")[2] in str(error) or key in _TOLD_BY_ANOTHER
        assert said, key


# Sizes that no longer fit others, which are named in their stead.
_TOLD_BY_ANOTHER = (
    "qwen3moe.embedding_length",
    "qwen3moe.attention.head_count",
    "qwen3moe.attention.key_length",
    "tokenizer.ggml.token_type",
)
_NOT_LISTED = (
    "general.alignment",
    "general.quantization_version",
    # Without effect where the vocabulary lists its merges.
    "tokenizer.ggml.scores",
    "tokenizer.ggml.add_space_prefix",
    # No positions are scaled, so what they were scaled from says nothing.
    "qwen3moe.rope.scaling.original_context_length",
)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("qwen3moe.attn_logit_softcapping", 30.0),
        ("qwen3moe.expert_weights_scale", 2.5),
        ("qwen3moe.expert_gating_func", 2),
        ("qwen3moe.rope.dimension_sections", [8, 8, 8, 0]),
        ("qwen3moe.rope.scaling.alpha", 1000.0),
        ("qwen3moe.rope.scaling.type", "ntk"),
        ("qwen3moe.key_of_tomorrow", True),
        ("tokenizer.ggml.pre", "spark2_5"),
        ("tokenizer.ggml.model", "rwkv"),
    ],
)
def test_what_changes_the_model_is_refused_by_name(moe: Path, key: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=key.replace(".", "[.]")):
        _with(read_container([moe]), **{key: value})


def test_a_tensor_without_a_place_is_refused_by_name(moe: Path) -> None:
    container = read_container([moe])
    block = container.blocks["blk.0.ffn_down_exps.weight"]
    name = "blk.0.ffn_down_exps.scale"
    container.blocks[name] = replace(block, name=name)
    with pytest.raises(CheckpointError, match=r"ffn_down_exps[.]scale"):
        _ = GgufModel(container).tensors


def test_layers_that_predict_further_tokens_are_left_out_and_listed(moe: Path) -> None:
    container = read_container([moe])
    block = container.blocks["blk.0.attn_norm.weight"]
    name = "blk.2.nextn.enorm.weight"
    container.blocks[name] = replace(block, name=name)
    count = {"qwen3moe.block_count": 3, "qwen3moe.nextn_predict_layers": 1}
    found = _with(container, **count)
    assert found.config["num_hidden_layers"] == 2
    assert name in found.left_out
    assert not any("layers.2" in tensor for tensor in found.tensors)


def test_another_architecture_is_refused_with_the_list(moe: Path) -> None:
    with pytest.raises(FamilyError, match=r"qwen3moe.*got 'mamba'"):
        _with(read_container([moe]), **{"general.architecture": "mamba"})


def test_a_split_file_is_one_checkpoint_and_a_missing_part_is_named(
    sources: Callable[..., tuple[Path, Any]], moe: Path, tmp_path: Path
) -> None:
    folder, _ = sources("qwen3_moe", norm_topk_prob=True)
    write_gguf(folder, tmp_path / "split.gguf", split_tensors=10)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert len(parts) > 2
    whole, split = open_gguf(moe), open_gguf(tmp_path)
    assert whole is not None
    assert split is not None
    assert split is open_gguf(parts[1])
    assert set(whole.tensors) == set(split.tensors)
    assert Checkpoint(parts[0]).weights == parts
    parts[-1].unlink()
    with pytest.raises(CheckpointError, match=f"no {parts[-1].name}"):
        open_gguf(parts[0])


def test_the_settings_are_those_of_a_hugging_face_checkpoint(moe: Path) -> None:
    checkpoint = Checkpoint(moe)
    assert checkpoint.read("chat_template.jinja") == (
        b"{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    assert b'"eos_token_id": 2' in (checkpoint.read("generation_config.json") or b"")
    assert checkpoint.read("absent.json") is None
    assert checkpoint.tokenizer.encode("the").tokens == ["th", "e"]
    assert checkpoint.tokenizer.encode("</s>a").ids[0] == 2


def test_inspect_says_types_and_bits(moe: Path) -> None:
    facts = describe(moe)
    assert facts["kind"] == "MoE checkpoint"
    assert facts["format"] == "GGUF, architecture qwen3moe"
    assert facts["dtypes"] == ["F32"]
    assert facts["bits_per_weight"] == 32
    assert facts["experts_per_layer"] == [8, 8]


def test_digits_are_tokens_of_their_own_where_the_vocabulary_says_so(moe: Path) -> None:
    container = read_container([moe])
    words = tokens(272)
    words[-2:] = ["ĠĠ", "Ġ1"]
    changes = {"tokenizer.ggml.tokens": words, "tokenizer.ggml.merges": ["Ġ Ġ", "Ġ 1"]}
    found = {}
    for name in ("gpt-2", "smollm"):
        model = _with(container, **{**changes, "tokenizer.ggml.pre": name})
        text = model.settings["tokenizer.json"].decode()
        found[name] = Tokenizer.from_str(text).encode("a  12").tokens
    # GPT-2 leaves the last space to the number, SmolLM takes digits apart before.
    assert found == {"gpt-2": ["a", "Ġ", "Ġ1", "2"], "smollm": ["a", "ĠĠ", "1", "2"]}


def test_a_sentencepiece_vocabulary_merges_by_score(moe: Path) -> None:
    pieces = ["<unk>", "<s>", "</s>", "▁", "a", "b", "▁a", "ab", "▁ab", "<0x21>"]
    changes = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 1, 1, 1, 1, 6],
        # "ab" comes before "▁a", although its id is higher.
        "tokenizer.ggml.scores": [0.0, 0, 0, -9, -9, -9, -2, -1, -3, 0],
        "tokenizer.ggml.add_bos_token": True,
    }
    container = read_container([moe])
    container.metadata.pop("tokenizer.ggml.merges")
    made = Tokenizer.from_str(_with(container, **changes).settings["tokenizer.json"].decode())
    assert made.encode("ab ba!").tokens == ["<s>", "▁ab", "▁", "b", "a", "<0x21>"]
    assert made.decode(made.encode("ab ba!").ids) == "ab ba!"


def _patched(content: bytes, at: int, form: str, value: int) -> bytes:
    packed = struct.pack(form, value)
    return content[:at] + packed + content[at + len(packed) :]


def test_sizes_that_a_file_cannot_have_are_refused_at_once(moe: Path, tmp_path: Path) -> None:
    content = moe.read_bytes()
    array = content.index(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens") + 8
    tensor = content.index(b"blk.0.attn_k.weight") + len(b"blk.0.attn_k.weight")
    broken = {
        "magic": b"GGML" + content[4:],
        "version": _patched(content, 4, "<I", 9),
        "big endian": _patched(content, 4, ">I", 3),
        "tensors": _patched(content, 8, "<Q", 1 << 60),
        "keys": _patched(content, 16, "<Q", 1 << 60),
        "name": _patched(content, 24, "<Q", 1 << 62),
        "array": _patched(content, array, "<Q", 1 << 60),
        "dimensions": _patched(content, tensor, "<I", 1 << 31),
        "shape": _patched(content, tensor + 4, "<Q", 1 << 50),
        "offset": _patched(content, tensor + 24, "<Q", 1 << 40),
        "empty": b"",
        "data cut": content[:-4000],
    }
    broken |= {f"cut at {end}": content[:end] for end in range(4, array, 97)}
    file = tmp_path / "broken.gguf"
    began = time.process_time()
    for name, bad in broken.items():
        file.write_bytes(bad)
        with pytest.raises(CheckpointError, match="GGUF") as caught:
            open_gguf(file)
        assert len(str(caught.value)) < 800, name
    assert time.process_time() - began < 10


def test_a_changed_byte_opens_or_is_refused(moe: Path, tmp_path: Path) -> None:
    content = moe.read_bytes()
    header = content.index(b"output.weight") + 100
    draw = random.Random(0)
    opened, longest = 0, 0
    for number in range(150):
        file = tmp_path / f"{number}.gguf"
        at = draw.randrange(header)
        file.write_bytes(content[:at] + bytes([draw.randrange(256)]) + content[at + 1 :])
        try:
            model = open_gguf(file)
            assert model is not None
            _ = model.settings, model.tensors
            opened += 1
        except EdgemoeError as error:
            longest = max(longest, len(str(error)))
        file.unlink()
    assert 0 < opened < 150
    assert longest < 1000
