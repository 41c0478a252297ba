"""Metrics against independent computations, over real tokenizers and a table of scores."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import Whitespace

from edgemoe.errors import CheckpointError, TaskFileError
from edgemoe.evaluate.evaluation import evaluate
from edgemoe.evaluate.requests import build_examples
from edgemoe.evaluate.scorer import Logprobs, Request
from edgemoe.evaluate.subject import open_subject
from edgemoe.tasks import TaskFile

KEYS = ["task", "metric", "value", "ci95", "n", "perplexity", "tokens"]


class TableScorer:
    """Gives token t the log-probability -t / 10, whatever comes before."""

    max_length = 600

    def __init__(self) -> None:
        self.requests: list[Request] = []

    def score(self, requests: Sequence[Request]) -> list[list[Logprobs]]:
        self.requests = list(requests)
        return [
            [-np.array(part, dtype=np.float64) / 10 for part in r.continuations]
            for r in requests
        ]


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(96)}, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    return tokenizer


def write_task(folder: Path, rows: Sequence[dict[str, object]]) -> TaskFile:
    path = folder / "t.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TaskFile.load("t", path)


def text(*ids: int) -> dict[str, object]:
    return {"text": " ".join(f"w{i}" for i in ids)}


def test_perplexity_of_windows_leaves_their_first_tokens_out(
    tmp_path: Path, words: Tokenizer
) -> None:
    random = np.random.Generator(np.random.PCG64(0))
    lines = [random.integers(1, 96, size=size).tolist() for size in (1200, 3, 1, 512, 513)]
    task = write_task(tmp_path, [text(*line) for line in lines])
    found = evaluate(TableScorer(), task, words)
    scored = [
        token for line in lines for position, token in enumerate(line) if position % 512 != 0
    ]
    assert (found.metric, found.n, found.tokens) == ("perplexity", 4, len(scored))
    assert (
        found.value
        == found.perplexity
        == pytest.approx(math.exp(sum(scored) / len(scored) / 10))
    )
    assert found.ci95[0] < found.value < found.ci95[1]
    answer = found.to_dict()
    assert list(answer) == KEYS
    assert json.loads(json.dumps(answer, allow_nan=False)) == answer
    assert list(found.to_dict(details=True)) == [*KEYS, "details"]
    json.dumps(found.to_dict(details=True), allow_nan=False)
    cut = evaluate(TableScorer(), task, words, max_tokens=1202)
    assert (cut.n, cut.tokens) == (2, 1200 - 3 + 1)


def test_a_prefix_token_adds_the_likelihood_of_whole_texts(
    tmp_path: Path, words: Tokenizer
) -> None:
    lines = [[5, 6, 7, 8, 9], [4], [30, 20]]
    task = write_task(tmp_path, [text(*line) for line in lines])
    scorer = TableScorer()
    found = evaluate(scorer, task, words, window=3, prefix_token=1)
    # As without it: 5 and 8 begin a window, and a line of one token has no context.
    assert (found.n, found.line_tokens) == (2, (3, 1))
    assert found.value == pytest.approx(math.exp((6 + 7 + 9 + 20) / 4 / 10))
    details = found.details
    assert (details["window_tokens"], details["prefix_token"]) == (3, 1)
    size = sum(len(" ".join(f"w{i}" for i in line)) for line in lines)
    total = sum(map(sum, lines)) / 10
    assert details["log_likelihood"] == pytest.approx(-total)
    assert details["byte_perplexity"] == pytest.approx(math.exp(total / size))
    assert details["word_perplexity"] == pytest.approx(math.exp(total / 8))
    assert details["bits_per_byte"] == pytest.approx(total / size / math.log(2))
    # What both ask for is asked once, and so is a line that comes twice.
    assert len(scorer.requests) == len(set(scorer.requests))
    twice = write_task(tmp_path, [text(5, 6), text(5, 6)])
    assert evaluate(scorer, twice, words).line_losses == pytest.approx((0.6, 0.6))
    assert scorer.requests == [Request((5,), ((6,),))]
    cut = evaluate(scorer, task, words, prefix_token=1, max_tokens=3)
    assert (cut.details["words"], cut.details["bytes"]) == (3, len("w5 w6 w7"))
    assert "byte_perplexity" not in evaluate(scorer, task, words).details
    for window in (1, 601):
        with pytest.raises(TaskFileError, match=rf"\[2, 600\] tokens.*got {window}"):
            evaluate(scorer, task, words, window=window)


def test_perplexity_of_completions_counts_only_them(tmp_path: Path, words: Tokenizer) -> None:
    rows: list[dict[str, object]] = [
        {"prompt": "w1 w2", "completion": " w30 w40"},
        {"prompt": "w3", "completion": " w50"},
        {"prompt": "w3", "completion": " w60 w60 w60"},
    ]
    task = write_task(tmp_path, rows)
    found = evaluate(TableScorer(), task, words)
    assert (found.metric, found.n, found.tokens) == ("perplexity", 3, 6)
    assert found.value == pytest.approx(math.exp((3 + 4 + 5 + 18) / 6))
    assert found.line_losses == pytest.approx((7, 5, 18))
    assert found.details["perplexity_per_line"] == pytest.approx(math.exp((7 + 5 + 18) / 3))
    assert evaluate(TableScorer(), task, words, max_tokens=7).n == 2
    assert evaluate(TableScorer(), task, words, max_tokens=6).n == 2
    assert evaluate(TableScorer(), task, words, max_tokens=5).n == 1


def test_accuracy_in_total_and_per_character(tmp_path: Path, words: Tokenizer) -> None:
    rows = [
        # In total -1.0 beats -1.2; per character -0.33 loses to -0.2.
        {"prompt": "w1", "choices": [" w10", " w6 w6"], "answer": 0},
        {"prompt": "w1", "choices": [" w10", " w6 w6"], "answer": 1},
        {"prompt": "w1", "choices": [" w9", " w8", " w7"], "answer": 2},
        {"prompt": "w1", "choices": [" w9", " w8", " w7"], "answer": 0},
    ]
    found = evaluate(TableScorer(), write_task(tmp_path, rows), words)
    assert (found.metric, found.value, found.n, found.tokens) == ("accuracy", 0.5, 4, 5)
    assert found.perplexity == pytest.approx(math.exp((1.0 + 1.2 + 0.7 + 0.9) / 5))
    assert found.details["accuracy_per_character"] == 0.5
    assert found.details["accuracy_of_chance"] == pytest.approx((0.5 + 0.5 + 1 / 3 + 1 / 3) / 4)
    assert found.details["accuracy_of_most_frequent_answer"] == 0.25
    first = evaluate(TableScorer(), write_task(tmp_path, rows[:1]), words)
    assert (first.value, first.details["accuracy_per_character"]) == (1.0, 0.0)
    # A wide space is one character of three bytes: -0.9 / 5 beats -1.0 / 4, and -0.9 / 3 not.
    wide = [{"prompt": "w1", "choices": [" w10", "\u3000w9"], "answer": 0}]
    found = evaluate(TableScorer(), write_task(tmp_path, wide), words)
    assert (found.value, found.details["accuracy_per_character"]) == (0.0, 1.0)
    assert found.details["accuracy_per_byte"] == 0.0


def test_a_token_across_the_seam_counts_to_every_choice(tmp_path: Path) -> None:
    tokenizer = Tokenizer(BPE({"a": 0, "b": 1, "c": 2, "bc": 3}, [("b", "c")]))
    rows = [{"prompt": "ab", "choices": ["c", "a", "ca"], "answer": 0}]
    (question,) = build_examples(
        write_task(tmp_path, rows), tokenizer, max_length=9, max_tokens=None
    )
    assert question.requests == (Request((0,), ((3,), (1, 0), (3, 0))),)
    with pytest.raises(TaskFileError, match=r"t\.jsonl, line 1: .* two or more tokens"):
        build_examples(
            write_task(tmp_path, [{"prompt": "b", "completion": "c"}]),
            tokenizer,
            max_length=9,
            max_tokens=None,
        )


def test_white_space_at_the_prompts_end_counts_to_what_follows(tmp_path: Path) -> None:
    tokenizer = Tokenizer(BPE({"a": 0, "b": 1, " ": 2, "\n": 3, " b": 4}, [(" ", "b")]))
    rows: list[dict[str, object]] = [
        {"prompt": "ab\n", "completion": "a"},
        {"prompt": "ab ", "completion": "a"},
        {"prompt": "ab ", "completion": "b"},
        # Nothing else is there to be context.
        {"prompt": " \n", "completion": "a"},
    ]
    questions = build_examples(
        write_task(tmp_path, rows), tokenizer, max_length=9, max_tokens=None
    )
    assert [question.requests for question in questions] == [
        (Request((0, 1), ((3, 0),)),),
        (Request((0, 1), ((2, 0),)),),
        (Request((0, 1), ((4,),)),),
        (Request((2, 3), ((0,),)),),
    ]


def test_long_prompts_lose_their_beginning_and_long_completions_are_refused(
    tmp_path: Path, words: Tokenizer
) -> None:
    task = write_task(tmp_path, [{"prompt": "w1 w2 w3 w4", "completion": " w5 w6"}])
    (question,) = build_examples(task, words, max_length=3, max_tokens=None)
    # The last token is never read.
    assert question.requests == (Request((3, 4), ((5, 6),)),)
    rows = [{"prompt": "w1 w2 w3 w4", "choices": [" w5 w6", " w7"], "answer": 1}]
    (question,) = build_examples(
        write_task(tmp_path, rows), words, max_length=3, max_tokens=None
    )
    assert question.requests == (Request((3, 4), ((5, 6),)), Request((2, 3, 4), ((7,),)))
    with pytest.raises(TaskFileError, match=r"line 1: .* under 2 tokens, got 2"):
        build_examples(task, words, max_length=1, max_tokens=None)
    with pytest.raises(TaskFileError, match="no context"):
        evaluate(TableScorer(), write_task(tmp_path, [text(3)]), words)
    with pytest.raises(TaskFileError, match="max_tokens"):
        evaluate(TableScorer(), task, words, max_tokens=1)


def test_a_model_that_answers_nan_is_refused(tmp_path: Path, words: Tokenizer) -> None:
    class NanScorer(TableScorer):
        def score(self, requests: Sequence[Request]) -> list[list[Logprobs]]:
            return [[part * np.nan for part in parts] for parts in super().score(requests)]

    with pytest.raises(CheckpointError, match="finite"):
        evaluate(NanScorer(), write_task(tmp_path, [text(1, 2)]), words)


def test_nan_of_a_wrong_choice_is_refused_too(tmp_path: Path, words: Tokenizer) -> None:
    class NanScorer(TableScorer):
        def score(self, requests: Sequence[Request]) -> list[list[Logprobs]]:
            return [[parts[0], parts[1] * np.nan] for parts in super().score(requests)]

    rows = [{"prompt": "w1", "choices": [" w2", " w3"], "answer": 0}]
    with pytest.raises(CheckpointError, match="finite"):
        evaluate(NanScorer(), write_task(tmp_path, rows), words)


def test_choices_with_nothing_before_them_are_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer(
        BPE({"a": 0, "b": 1, "c": 2, "ab": 3, "ac": 4}, [("a", "b"), ("a", "c")])
    )
    rows = [{"prompt": "a", "choices": ["ba", "ca"], "answer": 0}]
    with pytest.raises(TaskFileError, match=r"line 1: .* begin with the same token"):
        build_examples(write_task(tmp_path, rows), tokenizer, max_length=9, max_tokens=None)


def test_checkpoints_are_opened_and_judged_end_to_end(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    path = make_checkpoint("qwen2_moe")
    rng = np.random.Generator(np.random.PCG64(0))
    lines = [rng.integers(1, 96, size=size).tolist() for size in (100, 5, 40)]
    task = write_task(tmp_path, [text(*line) for line in lines])
    with open_subject(path) as (scorer, tokenizer, *_):
        found = evaluate(scorer, task, tokenizer)
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    losses, tokens = 0.0, 0
    for line in lines:
        # The tiny model has 64 positions, so its windows have 64 tokens.
        for start in range(0, len(line), 64):
            ids = torch.tensor([line[start : start + 64]])
            with torch.inference_mode():
                loss = float(model(input_ids=ids, labels=ids).loss)
            losses += loss * (ids.shape[1] - 1)
            tokens += ids.shape[1] - 1
    assert found.tokens == tokens
    assert found.value == pytest.approx(math.exp(losses / tokens), rel=1e-4)
    with open_subject(path, k_cap=1) as (scorer, tokenizer, *_):
        assert evaluate(scorer, task, tokenizer).value != pytest.approx(found.value, rel=1e-4)


def test_dense_checkpoints_are_judged(
    make_checkpoint: Callable[..., Path], words: Tokenizer, tmp_path: Path
) -> None:
    import transformers

    path = tmp_path / "dense"
    size: dict[str, Any] = {
        "vocab_size": 96,
        "hidden_size": 16,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**size)).save_pretrained(path)
    words.save(str(path / "tokenizer.json"))
    task = write_task(tmp_path, [text(1, 2, 3)])
    with open_subject(path) as (scorer, tokenizer, *_):
        assert evaluate(scorer, task, tokenizer).value == pytest.approx(96, rel=0.2)
    with pytest.raises(CheckpointError, match="dense"), open_subject(path, k_cap=1):
        pass
    (path / "model.safetensors").unlink()
    torch.save({}, path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="safetensors"), open_subject(path):
        pass
    with pytest.raises(CheckpointError, match="does not exist"), open_subject(tmp_path / "no"):
        pass
