"""Lines of task files: what each kind holds, and the rules that a line must keep."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from edgemoe.errors import TaskFileError
from edgemoe_runtime.input_files import parse_strict
from edgemoe_runtime.messages import clip, quote

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    # Messages and where they are, to prompt and completion.
    RenderChat: TypeAlias = Callable[[Sequence[Mapping[str, Any]], str], tuple[str, str]]

Kind: TypeAlias = Literal["text", "completion", "choice"]

KINDS_REMEDY = (
    'Use exactly the keys of one kind: {"text"}, {"prompt", "completion"}, '
    '{"prompt", "choices", "answer"} or {"messages"}.'
)


@dataclass(frozen=True, kw_only=True)
class TextRecord:
    """One line whose whole text is the task's."""

    line: int
    text: str

    @property
    def calibration_text(self) -> str:
        """Text that calibration reads."""
        return self.text


@dataclass(frozen=True, kw_only=True)
class CompletionRecord:
    """One line whose completion is judged given its prompt."""

    line: int
    prompt: str
    completion: str

    @property
    def calibration_text(self) -> str:
        """Prompt and completion, which calibration reads."""
        return self.prompt + self.completion


@dataclass(frozen=True, kw_only=True)
class ChoiceRecord:
    """One question; `answer` in [0, len(choices)) is the right choice."""

    line: int
    prompt: str
    choices: tuple[str, ...]
    answer: int

    @property
    def calibration_text(self) -> str:
        """Prompt and right choice, which calibration reads."""
        return self.prompt + self.choices[self.answer]


TaskRecord: TypeAlias = "TextRecord | CompletionRecord | ChoiceRecord"


def parse_line(
    line: str, number: int, where: str, render: RenderChat | None
) -> tuple[Kind | Literal["chat"], TaskRecord]:
    """Parse and check a line.

    Args:
        line: The line.
        number: Its number, from 1 on.
        where: What messages call it.
        render: As in `edgemoe.tasks.TaskFile.load`.

    Returns:
        Its kind, and what it holds; messages are a completion by then.

    Raises:
        TaskFileError: It breaks a rule.
    """
    value = _parse_object(line, where)
    keys = frozenset(value)
    if keys == {"messages"}:
        return "chat", _parse_chat(value["messages"], number, where, render)
    for parser_keys, parser in _PARSERS:
        if keys == parser_keys:
            return parser(value, number, where)
    raise TaskFileError(f"{where}: unknown keys, got {quote(sorted(keys))}. {KINDS_REMEDY}")


def _parse_object(line: str, where: str) -> dict[str, Any]:
    if not line.strip():
        raise TaskFileError(
            f"{where}: a line must be one JSON object, got an empty line. Remove the line."
        )

    try:
        value = parse_strict(line)
    except json.JSONDecodeError as error:
        raise TaskFileError(
            f"{where}: a line must be one JSON object, got broken JSON ({error.msg} at column "
            f"{error.colno}). Correct the line."
        ) from error
    except ValueError as error:  # a key twice, NaN, too deep, or an integer of 5,000 digits
        raise TaskFileError(
            f"{where}: a line must be one flat JSON object of strings and one index, got JSON "
            f"that edgemoe refuses to read: {error}. Correct the line."
        ) from error
    if not isinstance(value, dict):
        raise TaskFileError(
            f"{where}: a line must be one JSON object, got {_json_type(value)}. {KINDS_REMEDY}"
        )
    return value


def _parse_text(value: dict[str, Any], number: int, where: str) -> tuple[Kind, TaskRecord]:
    return "text", TextRecord(line=number, text=_string(value["text"], '"text"', where))


def _parse_completion(
    value: dict[str, Any], number: int, where: str
) -> tuple[Kind, TaskRecord]:
    return "completion", CompletionRecord(
        line=number,
        prompt=_string(value["prompt"], '"prompt"', where),
        completion=_string(value["completion"], '"completion"', where),
    )


def _parse_chat(
    messages: object, number: int, where: str, render: RenderChat | None
) -> TaskRecord:
    if not isinstance(messages, list) or len(messages) < 2:
        raise TaskFileError(
            f'{where}: "messages" must be a list of two or more, of which the assistant says '
            f"the last, got {quote(messages, 80)}."
        )
    for place, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        if not isinstance(role, str) or not role:
            raise TaskFileError(
                f'{where}: "messages"[{place}] must be an object with "role" and "content", '
                f"got {quote(message, 80)}."
            )
        for key in ("content", "role"):
            if isinstance(message.get(key), str) and message[key]:
                _string(message[key], f'"messages"[{place}]["{key}"]', where)
    if messages[-1]["role"] != "assistant":
        raise TaskFileError(
            f"{where}: the last message must be the assistant's, which is what is judged, got "
            f"one of {quote(messages[-1]['role'], 40)}. Add the answer, or remove the line."
        )
    if render is None:
        raise TaskFileError(
            f"{where}: lines of messages need the chat template of a model, got none here. Use "
            "edgemoe.chat_tasks.load_task, or write prompt and completion."
        )
    prompt, completion = render(messages, where)
    return CompletionRecord(line=number, prompt=prompt, completion=completion)


def _parse_choice(value: dict[str, Any], number: int, where: str) -> tuple[Kind, TaskRecord]:
    raw, answer = value["choices"], value["answer"]
    if not isinstance(raw, list):
        raise TaskFileError(
            f'{where}: "choices" must be a list of strings, got {_json_type(raw)}.'
        )
    choices = tuple(
        _string(choice, f'"choices"[{index}]', where) for index, choice in enumerate(raw)
    )
    if len(choices) < 2 or len(set(choices)) != len(choices):
        raise TaskFileError(
            f'{where}: "choices" must be two or more different strings, got '
            f"{quote(list(choices))}."
        )
    if not isinstance(answer, int) or isinstance(answer, bool):
        raise TaskFileError(
            f'{where}: "answer" must be the right choice\'s index, an integer, got '
            f"{_json_type(answer)}. Counting starts at 0."
        )
    if not 0 <= answer < len(choices):
        raise TaskFileError(
            f'{where}: "answer" must be in [0, {len(choices)}) for {len(choices)} choices, got '
            f"{answer}. Counting starts at 0."
        )
    prompt = _string(value["prompt"], '"prompt"', where)
    return "choice", ChoiceRecord(line=number, prompt=prompt, choices=choices, answer=answer)


_PARSERS: tuple[
    tuple[frozenset[str], Callable[[dict[str, Any], int, str], tuple[Kind, TaskRecord]]], ...
] = (
    (frozenset({"text"}), _parse_text),
    (frozenset({"prompt", "completion"}), _parse_completion),
    (frozenset({"prompt", "choices", "answer"}), _parse_choice),
)


def _string(value: object, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise TaskFileError(f"{where}: {name} must be a string, got {_json_type(value)}.")
    if not value:
        raise TaskFileError(
            f"{where}: {name} must not be empty. Remove the line or fill it in."
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TaskFileError(
            f"{where}: {name} must be valid Unicode, got the lone surrogate "
            f"U+{ord(value[error.start]):04X}. Escape the character as a surrogate pair."
        ) from error
    return value


def _json_type(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, (int, float)):
        return f"the number {clip(str(value), 40)}"
    if isinstance(value, str):
        return "a string"
    return "a list" if isinstance(value, list) else "an object"
