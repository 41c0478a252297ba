"""Exact match against a loop of full forward passes."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from edgemoe.errors import TaskFileError
from edgemoe.evaluate.evaluation import evaluate
from edgemoe.evaluate.exact_match import count_exact_matches
from edgemoe.evaluate.intervals import wilson_interval
from edgemoe.evaluate.requests import build_examples
from edgemoe.evaluate.subject import open_subject
from edgemoe.tasks import CompletionRecord, TaskFile

PROMPTS = ([5, 6, 7], [40, 3], list(range(3, 80)))
NEW_TOKENS = 3


def greedy(model: Any, ids: Sequence[int]) -> list[int]:
    made: list[int] = []
    with torch.inference_mode():
        for _ in range(NEW_TOKENS):
            logits = model(input_ids=torch.tensor([[*ids, *made]]), use_cache=False).logits
            made.append(int(logits[0, -1].argmax()))
    return made


def words(ids: Sequence[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


def task_of(path: Path, completions: Sequence[Sequence[int]]) -> TaskFile:
    rows = [
        {"prompt": words(prompt), "completion": " " + words(completion)}
        for prompt, completion in zip(PROMPTS, completions, strict=True)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TaskFile.load("t", path)


def test_completions_that_the_model_makes_match(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    # No token ends the text, so that every completion has all its tokens.
    path = make_checkpoint("glm4_moe", eos_token_id=None)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    # The tiny model has 64 positions; the last prompt loses its beginning.
    made = [greedy(model, prompt[-(64 - NEW_TOKENS) :]) for prompt in PROMPTS]
    wrong = [made[0], [made[1][0], made[1][1], made[1][2] ^ 1], made[2]]
    with open_subject(path) as (scorer, tokenizer, generate, _):
        all_right = evaluate(
            scorer, task_of(tmp_path / "a.jsonl", made), tokenizer, generate=generate
        )
        two_right = evaluate(
            scorer, task_of(tmp_path / "b.jsonl", wrong), tokenizer, generate=generate
        )
    assert (all_right.metric, all_right.value, all_right.n) == ("exact_match", 1.0, 3)
    assert (two_right.value, two_right.ci95) == (2 / 3, wilson_interval(2, 3))
    assert two_right.perplexity > all_right.perplexity
    with open_subject(path, k_cap=1) as (scorer, tokenizer, generate, _):
        capped = evaluate(
            scorer, task_of(tmp_path / "c.jsonl", made), tokenizer, generate=generate
        )
    assert capped.value < 1


def test_the_end_token_ends_and_does_not_count(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    endless = make_checkpoint("glm4_moe", eos_token_id=None)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        endless, dtype=torch.float32
    ).eval()
    made = greedy(model, PROMPTS[0])
    assert len(set(made)) > 1, "the second token must not be the first"
    end = next(index for index, token in enumerate(made) if token != made[0])
    path = make_checkpoint("glm4_moe", eos_token_id=made[end])
    with open_subject(path) as subject:
        assert subject.generate(words(PROMPTS[0]), NEW_TOKENS) == words(made[:end])


def test_the_checkpoints_own_settings_do_not_steer_generation(
    make_checkpoint: Callable[..., Path],
) -> None:
    path = make_checkpoint("glm4_moe", eos_token_id=None)
    with open_subject(path) as subject:
        plain = subject.generate(words(PROMPTS[0]), 12)
    settings = json.loads((path / "generation_config.json").read_text())
    changed = {**settings, "repetition_penalty": 50.0, "suppress_tokens": [3, 4, 5]}
    (path / "generation_config.json").write_text(json.dumps(changed))
    with open_subject(path) as subject:
        assert subject.generate(words(PROMPTS[0]), 12) == plain
    assert len(set(plain.split())) < 12, "a penalty could not show"


def test_a_space_at_the_prompts_end_belongs_to_the_completion() -> None:
    """Byte-level tokenizers join it to the word behind it, and so do the scored tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["Answer: bearing"] * 9, trainer)
    record = CompletionRecord(line=1, prompt="Answer: ", completion="bearing")
    task = TaskFile(name="t", path=Path("t"), kind="completion", records=(record,), sha256="")
    (question,) = build_examples(task, tokenizer, max_length=64, max_tokens=None)
    asked: list[tuple[str, int]] = []

    def generate(prompt: str, max_new_tokens: int) -> str:
        asked.append((prompt, max_new_tokens))
        return " bearing"

    found = count_exact_matches(generate, task, [question], tokenizer, max_length=64)
    assert (found, asked) == (1, [("Answer:", len(question.requests[0].continuations[0]))])


def test_text_has_nothing_to_generate(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": "w1 w2 w3"}))
    task = TaskFile.load("t", tmp_path / "t.jsonl")
    with (
        open_subject(make_checkpoint("qwen2_moe")) as (scorer, tokenizer, generate, _),
        pytest.raises(TaskFileError, match=r"kind text.*--generate"),
    ):
        evaluate(scorer, task, tokenizer, generate=generate)
