"""Task files: JSON Lines in UTF-8 of one kind, checked whole before any use.

Kinds, by their exact keys::

    {"text": "..."}                                             text: perplexity
    {"prompt": "...", "completion": "..."}                      completion: its perplexity
    {"prompt": "...", "choices": ["...", "..."], "answer": 0}   choice: accuracy
    {"messages": [{"role": "...", "content": "..."}, ...]}      chat: a completion, the last
        message, which the assistant says; rendered by the model's chat template

Prompts are joined to what follows them as they stand: a space between the two belongs
to the file. A UTF-8 byte order mark and empty lines at the end are accepted.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from edgemoe.errors import TaskFileError
from edgemoe.file_kinds import describe_mistake, identify
from edgemoe.task_lines import (
    KINDS_REMEDY,
    ChoiceRecord,
    CompletionRecord,
    Kind,
    TaskRecord,
    TextRecord,
    parse_line,
)
from edgemoe_runtime.bundle.names import TASK_NAME_RULE, is_task_name
from edgemoe_runtime.input_files import read_file
from edgemoe_runtime.messages import clip, quote

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgemoe.task_lines import RenderChat

__all__ = [
    "ChoiceRecord",
    "CompletionRecord",
    "Kind",
    "TaskFile",
    "TaskRecord",
    "TextRecord",
    "check_names_differ",
    "check_task_name",
    "split_task_argument",
    "split_task_arguments",
]


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
    def load(cls, name: str, path: Path | str, render: RenderChat | None = None) -> TaskFile:
        """Read and check a task file.

        Args:
            name: Letters, digits, `_`, `.` and `-`; it becomes part of file names.
            path: The JSON Lines file.
            render: Writes messages as prompt and completion; `edgemoe.chat_tasks.load_task`
                has that of a model. None refuses lines of messages.

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
        kind: Kind | Literal["chat"] | None = None
        for number, line in enumerate(_split_lines(data, path), start=1):
            line_kind, record = parse_line(line, number, f"{path}, line {number}", render)
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
                f"{KINDS_REMEDY}"
            )
        return cls(
            name=name,
            path=path,
            kind="completion" if kind == "chat" else kind,
            records=tuple(records),
            sha256=hashlib.sha256(data).hexdigest(),
        )


def split_task_argument(argument: str, of: str = "task") -> tuple[str, Path]:
    """Split `NAME=FILE` at the first equals sign.

    Args:
        argument: The command line's `NAME=FILE`.
        of: What the file is, a task or a plan; also the option's name.

    Returns:
        Name and path.

    Raises:
        TaskFileError: There is no equals sign, no file, or the name breaks the rule.
    """
    name, separator, path = argument.partition("=")
    if not separator or not path:
        file = "FILE.jsonl" if of == "task" else of.upper()
        example = file if separator else clip(argument, 80)
        raise TaskFileError(
            f"--{of} must be NAME={file}, got {quote(argument)}: the name is the task's, and "
            f"you choose it. Give --{of} defects={example}."
        )
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
            f"got {quote(name)}. Rename the task."
        )


def split_task_arguments(arguments: Sequence[str], of: str = "task") -> dict[str, Path]:
    """Split several `NAME=FILE` arguments.

    Args:
        arguments: The command line's arguments, in order.
        of: What the files are, tasks or plans.

    Returns:
        Paths by name, in the same order.

    Raises:
        TaskFileError: An argument is not `NAME=FILE`, or a name comes twice.
    """
    pairs = [split_task_argument(argument, of) for argument in arguments]
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
    kind = identify(path).name
    if kind not in ("task file", "json", "text", "other", "missing", "directory"):
        raise TaskFileError(
            f"a task file must be JSON Lines, got {describe_mistake(path)}. {KINDS_REMEDY}"
        )
    try:
        return read_file(path)
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
