"""The lines of a sweep's tasks: those that choose experts, and those that judge.

No line that judges is read by a calibration, whichever task it is of: a line whose text is
among the calibration lines of any task is left out. Log files repeat themselves.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from edgemoe.chat_tasks import load_task
from edgemoe.data_provenance import digest_line
from edgemoe.errors import TaskFileError
from edgemoe.evaluate.gate import ACCEPT_WEAK, MINIMUM_LINES, lines_are_few
from edgemoe.evaluate.held_out import hold_out
from edgemoe.evaluate.requests import build_examples
from edgemoe.tasks import CompletionRecord, TaskFile, TextRecord

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

    from tokenizers import Tokenizer

    from edgemoe.models.checkpoint import Checkpoint
    from edgemoe.tasks import TaskRecord

_MINIMUM_JUDGED = 2


@dataclass(frozen=True, kw_only=True)
class TaskLines:
    """One task.

    Attributes:
        calibration: Lines that choose experts.
        held_out: Lines that judge.
        left_out: Held-out lines that a calibration reads too, and which judge nothing.
    """

    calibration: TaskFile
    held_out: TaskFile
    left_out: int


def load_lines(
    tasks: Mapping[str, Path],
    held_out: Mapping[str, Path],
    seen: Collection[int] = frozenset(),
    model: Checkpoint | None = None,
) -> dict[str, TaskLines]:
    """Read tasks and set their lines apart.

    Args:
        tasks: Task files by name.
        held_out: Files to judge tasks by; every fourth line judges the other tasks.
        seen: Digests of lines that the swept checkpoint was itself made from.
        model: The checkpoint, whose template renders chats.

    Returns:
        The tasks, in their order.

    Raises:
        TaskFileError: A file breaks the format, is too short, or has no line to judge by that
            calibration does not read.
    """
    source = (None, None) if model is None else (model.path, model.read)
    pairs: dict[str, tuple[TaskFile, TaskFile]] = {}
    for name, path in tasks.items():
        task = load_task(name, path, *source)
        if name in held_out:
            pairs[name] = task, load_task(name, held_out[name], *source)
        else:
            remedy = f"Add lines, or give others to judge by: --held-out {name}=FILE."
            pairs[name] = hold_out(task, remedy=remedy)
    read = {digest_line(record) for task, _ in pairs.values() for record in task.records}
    read.update(seen)
    found = {}
    for name, (calibration, judging) in pairs.items():
        unread = tuple(line for line in judging.records if digest_line(line) not in read)
        left_out = len(judging.records) - len(unread)
        if len(unread) < _MINIMUM_JUDGED:
            raise TaskFileError(
                f"{judging.path}: task {name!r} must be judged by {_MINIMUM_JUDGED} lines or "
                f"more that no calibration reads, got {len(unread)}: {left_out} of "
                f"{len(judging.records)} held-out lines are calibration lines too. Give other "
                f"lines: --held-out {name}=FILE."
            )
        found[name] = TaskLines(
            calibration=calibration,
            held_out=replace(judging, records=unread),
            left_out=left_out,
        )
    return found


def check_judging(
    lines: Mapping[str, TaskLines],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    max_tokens: int,
    accept_few: bool = False,
) -> None:
    """Refuse held-out lines that could not be scored, before anything is measured.

    Args:
        lines: The tasks.
        tokenizer: The model's tokenizer.
        max_length: Most tokens that the model takes at once.
        max_tokens: Tokens of each task to judge by.
        accept_few: Whether fewer than 20 lines may judge.

    Raises:
        TaskFileError: A line is too long, or fewer than two lines have a token to score within
            `max_tokens`; fewer than 20 unless that is accepted.
    """
    for name, task in lines.items():
        questions = build_examples(
            task.held_out, tokenizer, max_length=max_length, max_tokens=max_tokens
        )
        if len(questions) < _MINIMUM_JUDGED:
            raise TaskFileError(
                f"{task.held_out.path}: task {name!r} must be judged by "
                f"{_MINIMUM_JUDGED} lines or more, or its interval says nothing, got "
                f"{len(questions)} in {max_tokens} tokens. Raise --held-out-tokens, or add "
                "lines."
            )
        if len(questions) < MINIMUM_LINES and not accept_few:
            more = len(task.held_out.records) - len(questions)
            remedy = "Raise --held-out-tokens" if more else "Add lines"
            raise TaskFileError(
                f"{task.held_out.path}: --max-drop must be judged by {MINIMUM_LINES} lines or "
                f"more, got task {name!r}: {lines_are_few(len(questions))}. {remedy}, or give "
                f"{ACCEPT_WEAK}: the report says so then."
            )


def write_lines(task: TaskFile, path: Path) -> None:
    """Write a task's lines as a task file, readable for its owner alone.

    Args:
        task: The task.
        path: The file, which is replaced.
    """
    rows = [json.dumps(_to_row(record), ensure_ascii=False) for record in task.records]
    path.touch(mode=0o600)
    path.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")


def _to_row(record: TaskRecord) -> dict[str, object]:
    if isinstance(record, TextRecord):
        return {"text": record.text}
    if isinstance(record, CompletionRecord):
        return {"prompt": record.prompt, "completion": record.completion}
    return {
        "prompt": record.prompt,
        "choices": list(record.choices),
        "answer": record.answer,
    }
