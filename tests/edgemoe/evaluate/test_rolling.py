"""Windows over whole texts against a walk over their tokens, and the arithmetic."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from edgemoe.errors import CheckpointError
from edgemoe.evaluate.rolling import (
    RollingText,
    exp_or_none,
    find_prefix_token,
    roll_text,
    summarise_rolling,
)

if TYPE_CHECKING:
    from pathlib import Path

PREFIX = 99


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(96)}, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return tokenizer


@settings(deadline=None)
@given(count=st.integers(1, 40), window=st.integers(1, 12), most=st.none() | st.integers(1, 45))
def test_every_token_is_scored_once_behind_those_before_it(
    words: Tokenizer, count: int, window: int, most: int | None
) -> None:
    text = " ".join(f"w{i}" for i in range(count))
    rolled = roll_text(
        text, words.encode(text), prefix_token=PREFIX, window=window, most_tokens=most
    )
    assert rolled is not None
    read = min(count, most or count)
    scored: list[int] = []
    for request in rolled.requests:
        (continuation,) = request.continuations
        start = len(scored)
        # The context is what stands before, with the prefix before all.
        before = [PREFIX, *range(start)]
        assert list(request.context) == before[len(before) - len(request.context) :]
        # No more is read than the model can, and the last window of several is full.
        inputs = len(request.context) + len(continuation) - 1
        assert inputs <= window
        assert inputs == window or len(rolled.requests) == 1
        scored += continuation
    assert scored == list(range(read))
    cut = " ".join(f"w{i}" for i in range(read))
    assert (rolled.utf8_bytes, rolled.words) == (len(cut), read)


def test_words_and_bytes_are_counted_as_lm_eval_counts_them(words: Tokenizer) -> None:
    text = " prüfen\n\tw2  "
    rolled = roll_text(
        text, words.encode(text), prefix_token=PREFIX, window=9, most_tokens=None
    )
    # White space at either end has an empty word beside it.
    assert rolled is not None
    assert (rolled.words, rolled.utf8_bytes) == (4, 14)
    assert (
        roll_text("  ", words.encode("  "), prefix_token=1, window=9, most_tokens=None) is None
    )


def test_quantities_follow_their_formulas() -> None:
    texts = [RollingText(requests=(), utf8_bytes=size, words=size // 4) for size in (40, 8, 20)]
    sums = [-30.0, -20.0, -11.0]
    found = summarise_rolling(texts, sums)
    assert (found["log_likelihood"], found["bytes"], found["words"]) == (-61.0, 68, 17)
    assert found["byte_perplexity"] == pytest.approx(math.exp(61 / 68))
    assert found["word_perplexity"] == pytest.approx(math.exp(61 / 17))
    assert found["bits_per_byte"] == pytest.approx(np.log2(found["byte_perplexity"]))
    low, high = found["byte_perplexity_ci95"]
    assert low < found["byte_perplexity"] < high
    # A long text without white space is one word.
    endless = summarise_rolling([RollingText(requests=(), utf8_bytes=9000, words=1)], [-9000.0])
    assert endless["word_perplexity"] is None
    assert exp_or_none(709.0) == math.exp(709.0)


@pytest.mark.parametrize(
    ("config", "legacy", "expected"),
    [
        ({"bos_token": "w1", "eos_token": "w2"}, None, 1),
        ({"bos_token": None, "eos_token": "w2"}, None, 2),
        ({"eos_token": {"content": "w3", "lstrip": False}}, None, 3),
        ({}, {"bos_token": {"content": "w4"}}, 4),
        ({"eos_token": "w2"}, {"bos_token": "w5"}, 5),
        ({"bos_token": "not a token"}, None, None),
        ({}, None, None),
        (None, None, None),
    ],
)
def test_the_prefix_is_the_begin_token_else_the_end_token(
    tmp_path: Path,
    words: Tokenizer,
    config: dict[str, object] | None,
    legacy: dict[str, object] | None,
    expected: int | None,
) -> None:
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    if legacy is not None:
        (tmp_path / "special_tokens_map.json").write_text(json.dumps(legacy))
    assert find_prefix_token(tmp_path, words) == expected


@pytest.mark.parametrize("content", ["{", "[]"])
def test_broken_settings_are_refused(tmp_path: Path, words: Tokenizer, content: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json must be .*JSON"):
        find_prefix_token(tmp_path, words)
