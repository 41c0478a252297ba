"""What a recovery trains on, and what it never sees.

Of every task each n-th line is held out, with n the inverse of the fraction asked for; at least
one line. Lines are read as `edgemoe evaluate` reads them: the same windows, and of completions
and right choices the same scored tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from edgemoe.errors import TaskFileError
from edgemoe.evaluate.requests import build_examples
from edgemoe.evaluate.scorer import Request

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tokenizers import Tokenizer

    from edgemoe.evaluate.requests import EvalExample
    from edgemoe.tasks import TaskFile

HELD_OUT_TOKENS = 2048
# Fewer than these judge too roughly, however few are trained on.
_LEAST_HELD_OUT_TOKENS = 512


@dataclass(frozen=True, kw_only=True)
class TaskSamples:
    """Sequences of one task.

    Attributes:
        name: The task.
        training: What is trained on; each has one continuation, the tokens to predict.
        held_out: What judges the training; at most `HELD_OUT_TOKENS` tokens, and beside
            few tokens to train on the same share of them as of the lines.
        held_out_lines: Lines that are behind it.
        questions: The held-out lines of a task of choices, with all of them; else none.
    """

    name: str
    training: tuple[Request, ...]
    held_out: tuple[Request, ...]
    held_out_lines: int
    questions: tuple[EvalExample, ...] = ()

    @property
    def training_tokens(self) -> int:
        """Tokens of one pass over what is trained on."""
        return sum(request.longest for request in self.training)


def split_task(
    task: TaskFile,
    tokenizer: Tokenizer,
    *,
    held_out_fraction: float,
    max_length: int,
    max_tokens: int | None = None,
) -> TaskSamples:
    """Cut a task into sequences, some of them held out.

    Args:
        task: The task.
        tokenizer: The model's tokenizer.
        held_out_fraction: Share of the lines that is held out, in (0, 0.5].
        max_length: Longest sequence in tokens.
        max_tokens: Tokens to train on at most.

    Returns:
        The sequences.

    Raises:
        TaskFileError: There are too few lines, or they have too few tokens.
    """
    every = min(round(1 / held_out_fraction), len(task.records))
    if every < 2:
        raise TaskFileError(
            f"{task.path}: a task to train on must have two or more lines, one of them "
            f"to judge the training by, got {len(task.records)}. Add lines."
        )
    records = {
        False: tuple(r for number, r in enumerate(task.records, 1) if number % every),
        True: tuple(r for number, r in enumerate(task.records, 1) if number % every == 0),
    }
    judging = HELD_OUT_TOKENS
    if max_tokens is not None:
        share = round(max_tokens / (every - 1))
        judging = min(judging, max(share, _LEAST_HELD_OUT_TOKENS))
    limits = {False: max_tokens, True: judging}
    requests: dict[bool, tuple[Request, ...]] = {}
    lines = 0
    for held_out, chosen in records.items():
        questions = build_examples(
            replace(task, records=chosen),
            tokenizer,
            max_length=max_length,
            max_tokens=limits[held_out],
        )
        requests[held_out] = tuple(
            request for question in questions for request in _right_ones(question)
        )
        lines = len(questions)
        choices = tuple(questions) if task.kind == "choice" else ()
    return TaskSamples(
        name=task.name,
        training=requests[False],
        held_out=requests[True],
        held_out_lines=lines,
        questions=choices,
    )


def _right_ones(question: EvalExample) -> Iterator[Request]:
    """List what is right of a line: a text's windows, a completion, or the right choice."""
    if not question.choices:
        yield from question.requests
        return
    # Choices have a request each where their prompt was cut, or else one together.
    pairs = [(r.context, one) for r in question.requests for one in r.continuations]
    context, continuation = pairs[question.answer]
    yield Request(context, (continuation,))


class Batches:
    """The sequences of one step after another, without end.

    Every task is read in passes, each in an order of its own. The next sequence is always of
    the task that has given the fewest tokens, so all tasks have equal shares. What is drawn
    depends on nothing but the arguments: a step that was reached once is reached again.
    """

    def __init__(self, tasks: Sequence[TaskSamples], batch_tokens: int, seed: int) -> None:
        """Begin with the first step.

        Args:
            tasks: The tasks.
            batch_tokens: Tokens of a step; the sequence that reaches it is the last.
            seed: Of the orders.
        """
        self._tokens = batch_tokens
        self._streams = [
            _read_in_passes(task.training, seed, number) for number, task in enumerate(tasks)
        ]
        self._given = [0] * len(tasks)

    def draw(self) -> list[Request]:
        """Return the sequences of the next step."""
        step: list[Request] = []
        left = self._tokens
        while left > 0:
            number = int(np.argmin(self._given))
            request = next(self._streams[number])
            self._given[number] += request.longest
            left -= request.longest
            step.append(request)
        return step


def _read_in_passes(requests: Sequence[Request], seed: int, number: int) -> Iterator[Request]:
    draw = np.random.default_rng([seed, number])
    while True:
        for index in draw.permutation(len(requests)):
            yield requests[index]
