"""Task files: JSON Lines in UTF-8 of one kind, checked whole before any use.

Kinds, by their exact keys::

    {"text": "..."}                                             text: perplexity
    {"prompt": "...", "completion": "..."}                      completion: its perplexity
    {"prompt": "...", "choices": ["...", "..."], "answer": 0}   choice: accuracy

Prompts are joined to what follows them as they stand: a space between the two belongs
to the file. A UTF-8 byte order mark and empty lines at the end are accepted.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from edgemoe.errors import TaskFileError
from edgemoe_runtime.bundle.names import TASK_NAME_RULE, is_task_name

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Kind: TypeAlias = Literal["text", "completion", "choice"]

_KINDS_REMEDY = (
    'Use exactly the keys of one kind: {"text"}, {"prompt", "completion"} or '
    '{"prompt", "choices", "answer"}.'
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


@dataclass(frozen=True, kw_only=True)
class TaskFile:
    """A task file, read and checked.

    Attributes:
        name: The task's name.
        path: Where the file lies.
        kind: What every line is.
        records: The lines in order.
        sha256: Hash of the file's bytes.
    """

    name: str
    path: Path
    kind: Kind
    records: tuple[TaskRecord, ...]
    sha256: str

    @classmethod
    def load(cls, name: str, path: Path | str) -> TaskFile:
        """Read and check a task file.

        Args:
            name: Letters, digits, `_`, `.` and `-`; it becomes part of file names.
            path: The JSON Lines file.

        Returns:
            The task, with every line checked.

        Raises:
            TaskFileError: The name, the file or a line breaks a rule; the message has the
                file and the line number.
        """
        check_task_name(name)
        path = Path(path)
        data = _read(path)
        records: list[TaskRecord] = []
        kind: Kind | None = None
        for number, line in enumerate(_split_lines(data, path), start=1):
            line_kind, record = _parse_line(line, number, f"{path}, line {number}")
            if kind is None:
                kind = line_kind
            elif line_kind != kind:
                raise TaskFileError(
                    f"{path}, line {number}: a file must hold one kind, got a {line_kind} line "
                    f"where line 1 is a {kind} line. Put each kind into its own file."
                )
            records.append(record)
        if kind is None:
            raise TaskFileError(
                f"{path}: a task file must have at least one line, got an empty file. "
                f"{_KINDS_REMEDY}"
            )
        return cls(
            name=name,
            path=path,
            kind=kind,
            records=tuple(records),
            sha256=hashlib.sha256(data).hexdigest(),
        )

    @classmethod
    def parse(cls, argument: str) -> TaskFile:
        """Load the task that a `NAME=FILE` argument names.

        Args:
            argument: The command line's `NAME=FILE`.

        Returns:
            The task.

        Raises:
            TaskFileError: The argument is not `NAME=FILE`, or `load` refuses it.
        """
        return cls.load(*split_task_argument(argument))


def split_task_argument(argument: str) -> tuple[str, Path]:
    """Split `NAME=FILE` at the first equals sign.

    Args:
        argument: The command line's `NAME=FILE`.

    Returns:
        Name and path.

    Raises:
        TaskFileError: There is no equals sign, no file, or the name breaks the rule.
    """
    name, separator, path = argument.partition("=")
    if not separator or not path:
        raise TaskFileError(f"a task must be NAME=FILE.jsonl, got {argument!r}.")
    check_task_name(name)
    return name, Path(path)


def check_task_name(name: str) -> None:
    """Refuse a task name that cannot be part of a file name.

    Args:
        name: The name.

    Raises:
        TaskFileError: The name breaks the rule.
    """
    if not is_task_name(name):
        raise TaskFileError(
            f"a task's name must be {TASK_NAME_RULE} and start with a letter or digit, "
            f"got {name!r}. Rename the task."
        )


def split_task_arguments(arguments: Sequence[str]) -> dict[str, Path]:
    """Split several `NAME=FILE` arguments.

    Args:
        arguments: The command line's arguments, in order.

    Returns:
        Paths by name, in the same order.

    Raises:
        TaskFileError: An argument is not `NAME=FILE`, or a name comes twice.
    """
    pairs = [split_task_argument(argument) for argument in arguments]
    check_names_differ([name for name, _ in pairs])
    return dict(pairs)


def check_names_differ(names: Sequence[str]) -> None:
    """Refuse two tasks of one name.

    Args:
        names: The tasks' names.

    Raises:
        TaskFileError: A name comes twice.
    """
    for name in names:
        if names.count(name) > 1:
            raise TaskFileError(
                f"task names must differ, got {name!r} twice. Rename one of them."
            )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except IsADirectoryError as error:
        raise TaskFileError(f"a task file must be a file, got the directory {path}.") from error
    except OSError as error:
        raise TaskFileError(
            f"{path}: the task file cannot be read: {error.strerror}. Check the path."
        ) from error


def _split_lines(data: bytes, path: Path) -> list[str]:
    # Only \n ends a line: str.splitlines would also split at U+2028 inside a JSON string.
    raw = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    while raw and not raw[-1].strip():
        raw.pop()
    return [_decode(line, f"{path}, line {number}") for number, line in enumerate(raw, start=1)]


def _decode(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TaskFileError(
            f"{where}: a task file must be UTF-8, got byte 0x{line[error.start]:02x} at column "
            f"{error.start + 1}. Convert the file to UTF-8."
        ) from error


def _parse_line(line: str, number: int, where: str) -> tuple[Kind, TaskRecord]:
    value = _parse_object(line, where)
    keys = frozenset(value)
    for parser_keys, parser in _PARSERS:
        if keys == parser_keys:
            return parser(value, number, where)
    raise TaskFileError(f"{where}: unknown keys, got {sorted(keys)}. {_KINDS_REMEDY}")


def _parse_object(line: str, where: str) -> dict[str, Any]:
    if not line.strip():
        raise TaskFileError(
            f"{where}: a line must be one JSON object, got an empty line. Remove the line."
        )

    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs):
            raise TaskFileError(
                f"{where}: keys must differ, got {[key for key, _ in pairs]}. Remove one."
            )
        return value

    try:
        value = json.loads(line, object_pairs_hook=refuse_duplicates)
    except json.JSONDecodeError as error:
        raise TaskFileError(
            f"{where}: a line must be one JSON object, got broken JSON ({error.msg} at column "
            f"{error.colno}). Correct the line."
        ) from error
    except TaskFileError:
        raise
    except (RecursionError, ValueError) as error:  # too deep, or an integer of 5,000 digits
        raise TaskFileError(
            f"{where}: a line must be one flat JSON object of strings and one index, got JSON "
            "that Python refuses to read. Correct the line."
        ) from error
    if not isinstance(value, dict):
        raise TaskFileError(
            f"{where}: a line must be one JSON object, got {_json_type(value)}. {_KINDS_REMEDY}"
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
            f'{where}: "choices" must be two or more different strings, got {list(choices)}.'
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
        return f"the number {value}"
    if isinstance(value, str):
        return "a string"
    return "a list" if isinstance(value, list) else "an object"
