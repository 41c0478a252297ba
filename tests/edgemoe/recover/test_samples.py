from __future__ import annotations

import itertools
import json
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from edgemoe.errors import TaskFileError
from edgemoe.evaluate.scorer import Request
from edgemoe.recover.options import RecoverOptions
from edgemoe.recover.samples import HELD_OUT_TOKENS, Batches, TaskSamples, split_task
from edgemoe.tasks import TaskFile
from edgemoe_exporters.validation.quality_gate import split_task as split_for_export

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def tokenizer() -> Tokenizer:
    made = Tokenizer(WordLevel({f"w{index}": index for index in range(96)}, unk_token="w0"))
    made.pre_tokenizer = Whitespace()
    return made


def write(path: Path, lines: list[dict[str, object]]) -> TaskFile:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return TaskFile.load("t", path)


def first_tokens(requests: tuple[Request, ...]) -> list[int]:
    return [request.context[0] for request in requests]


def test_every_fourth_line_is_held_out(tmp_path: Path, tokenizer: Tokenizer) -> None:
    task = write(tmp_path / "t.jsonl", [{"text": f"w{n} w1 w2"} for n in range(1, 11)])

    samples = split_task(task, tokenizer, held_out_fraction=0.25, max_length=64)

    assert first_tokens(samples.held_out) == [4, 8]
    assert first_tokens(samples.training) == [1, 2, 3, 5, 6, 7, 9, 10]
    assert samples.held_out_lines == 2
    assert samples.training_tokens == 24


def test_by_default_the_lines_are_those_that_export_judges_by(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    task = write(tmp_path / "t.jsonl", [{"text": f"w{n} w1"} for n in range(1, 23)])
    default = RecoverOptions().held_out_fraction

    samples = split_task(task, tokenizer, held_out_fraction=default, max_length=64)

    _, judged_by = split_for_export(task)
    assert first_tokens(samples.held_out) == [record.line for record in judged_by.records]


def test_short_files_hold_out_their_last_line(tmp_path: Path, tokenizer: Tokenizer) -> None:
    task = write(tmp_path / "t.jsonl", [{"text": f"w{n} w1"} for n in range(1, 4)])

    samples = split_task(task, tokenizer, held_out_fraction=0.125, max_length=64)

    assert first_tokens(samples.held_out) == [3]
    assert first_tokens(samples.training) == [1, 2]
    one = write(tmp_path / "one.jsonl", [{"text": "w1 w2"}])
    with pytest.raises(TaskFileError, match=r"two or more lines, one of them .* got 1"):
        split_task(one, tokenizer, held_out_fraction=0.5, max_length=64)


def test_right_choices_and_completions_are_what_is_learnt(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    lines: list[dict[str, object]] = [
        {"prompt": "w1 w2", "choices": [" w3", " w4 w5", " w6"], "answer": 1} for _ in range(2)
    ]
    task = write(tmp_path / "t.jsonl", lines)

    samples = split_task(task, tokenizer, held_out_fraction=0.5, max_length=64)

    assert samples.training == (Request((1, 2), ((4, 5),)),)


def test_tokens_are_limited(tmp_path: Path, tokenizer: Tokenizer) -> None:
    line: dict[str, object] = {"text": " ".join(["w1"] * 1000)}
    task = write(tmp_path / "t.jsonl", [line] * 20)

    def split(max_tokens: int | None) -> TaskSamples:
        return split_task(
            task, tokenizer, held_out_fraction=0.5, max_length=50, max_tokens=max_tokens
        )

    samples = split(120)

    assert [request.longest for request in samples.training] == [50, 50, 20]
    # Few tokens to train on are judged by as few, though not by too few.
    for limit, judging in {120: 512, 900: 900, 5000: HELD_OUT_TOKENS}.items():
        assert sum(request.longest for request in split(limit).held_out) == judging
    assert sum(request.longest for request in split(None).held_out) == HELD_OUT_TOKENS


@given(
    lengths=st.lists(
        st.lists(st.integers(2, 60), min_size=1, max_size=6), min_size=1, max_size=4
    ),
    batch_tokens=st.integers(2, 300),
    seed=st.integers(0, 5),
)
def test_tasks_have_equal_shares_and_steps_come_again(
    lengths: list[list[int]], batch_tokens: int, seed: int
) -> None:
    tasks = [
        TaskSamples(
            name=str(number),
            # The first token tells the task, the second the line.
            training=tuple(
                Request((number, line), ((0,) * (length - 1),))
                for line, length in enumerate(row)
            ),
            held_out=(),
            held_out_lines=0,
        )
        for number, row in enumerate(lengths)
    ]
    batches, again = Batches(tasks, batch_tokens, seed), Batches(tasks, batch_tokens, seed)

    steps = [batches.draw() for _ in range(8)]

    assert steps == [again.draw() for _ in range(8)]
    for step in steps:
        assert sum(request.longest for request in step[:-1]) < batch_tokens
        assert sum(request.longest for request in step) >= batch_tokens
    drawn = list(itertools.chain.from_iterable(steps))
    tokens = [sum(r.longest for r in drawn if r.context[0] == n) for n in range(len(tasks))]
    assert max(tokens) - min(tokens) <= 61
    for number, row in enumerate(lengths):
        order = [request.context[1] for request in drawn if request.context[0] == number]
        for start in range(0, len(order) - len(row) + 1, len(row)):
            assert sorted(order[start : start + len(row)]) == list(range(len(row)))
