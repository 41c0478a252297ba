"""Decoding token by token."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors

from edgemoe_runtime.decoding.tokenizer import Detokenizer, Tokenizer
from edgemoe_runtime.errors import BundleError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def byte_tokenizer(bundles: dict[str, Path]) -> Tokenizer:
    return Tokenizer(bundles["concat"] / "tokenizer.json")


@pytest.fixture(scope="module")
def fallback_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer as Llama 2 and Mixtral have one: unknown characters become byte tokens."""
    vocabulary = {"?": 0, "a": 1} | {f"<0x{byte:02X}>": 2 + byte for byte in range(256)}
    raw = RawTokenizer(models.BPE(vocabulary, [], unk_token="?", byte_fallback=True))
    raw.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    path = tmp_path_factory.mktemp("fallback") / "tokenizer.json"
    raw.save(str(path))
    return Tokenizer(path)


@settings(deadline=None)
@given(prompt=st.text(max_size=8), text=st.text(max_size=20))
def test_pieces_make_the_text_and_never_half_a_character(
    byte_tokenizer: Tokenizer, prompt: str, text: str
) -> None:
    stream = Detokenizer(byte_tokenizer, byte_tokenizer.encode(prompt))
    pieces = [stream.push(token) for token in byte_tokenizer.encode(text)]
    assert "".join(pieces) + stream.flush() == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@settings(deadline=None)
@given(tokens=st.lists(st.integers(0, 255), max_size=30))
def test_broken_characters_end_as_the_whole_decoding(
    byte_tokenizer: Tokenizer, tokens: list[int]
) -> None:
    stream = Detokenizer(byte_tokenizer, [])
    text = "".join(map(stream.push, tokens)) + stream.flush()
    assert text == byte_tokenizer.decode(tokens)


def test_the_space_before_the_first_new_word_is_kept(tmp_path: Path) -> None:
    raw = RawTokenizer(models.WordLevel({"▁one": 0, "▁two": 1, "?": 2}, unk_token="?"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Metaspace()
    raw.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    stream = Detokenizer(tokenizer, tokenizer.encode("one"))
    assert stream.push(1) + stream.push(0) + stream.flush() == " two one"


@given(prompt=st.text("aé日😀", max_size=9), text=st.text("aé日😀", max_size=6))
@settings(deadline=None)
def test_byte_fallback_survives_a_cut_in_the_middle_of_a_character(
    fallback_tokenizer: Tokenizer, prompt: str, text: str
) -> None:
    stream = Detokenizer(fallback_tokenizer, fallback_tokenizer.encode(prompt))
    pieces = [stream.push(token) for token in fallback_tokenizer.encode(text)]
    assert "".join(pieces) + stream.flush() == text


def test_a_prompt_that_begins_with_the_first_special_token_gets_no_second(
    tmp_path: Path,
) -> None:
    raw = RawTokenizer(models.BPE({"a": 0, "b": 1}, []))
    raw.add_special_tokens(["<s>", "</s>"])
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    raw.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.encode("ab") == [2, 0, 1, 3]
    assert tokenizer.encode("<s>ab") == [2, 0, 1]
    assert tokenizer.encode("</s>ab") == [2, 3, 0, 1, 3]
    assert tokenizer.encode("") == [2, 3]
    assert tokenizer.encode("<s>ab", special_tokens=False) == [2, 0, 1]


def test_special_tokens_are_not_shown(byte_tokenizer: Tokenizer) -> None:
    stream = Detokenizer(byte_tokenizer, [])
    assert stream.push(256) + stream.flush() == ""


def test_a_broken_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BundleError, match=r"tokenizer\.json must be a tokenizer"):
        Tokenizer(tmp_path / "tokenizer.json")
