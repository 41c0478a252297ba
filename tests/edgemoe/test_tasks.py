"""Task files: what is accepted, and that each refusal names file, line and rule."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgemoe.errors import TaskFileError
from edgemoe.tasks import (
    ChoiceRecord,
    CompletionRecord,
    TaskFile,
    TextRecord,
    split_task_arguments,
)

CHOICE = {"prompt": "2+2=", "choices": ["4", "5"], "answer": 0}
# Surrogates cannot be encoded, and files of the task format must not hold them.
UNICODE = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


def write(tmp_path: Path, *lines: str | bytes) -> Path:
    path = tmp_path / "task.jsonl"
    data = [line.encode() if isinstance(line, str) else line for line in lines]
    path.write_bytes(b"".join(line + b"\n" for line in data))
    return path


def test_three_kinds(tmp_path: Path) -> None:
    text = TaskFile.load("a", write(tmp_path, '{"text": "x"}', '{"text": "y"}'))
    assert (text.kind, text.records) == (
        "text",
        (TextRecord(line=1, text="x"), TextRecord(line=2, text="y")),
    )
    pair = TaskFile.load("a", write(tmp_path, '{"prompt": "p", "completion": "c"}'))
    assert pair.records == (CompletionRecord(line=1, prompt="p", completion="c"),)
    assert pair.records[0].calibration_text == "pc"
    choice = TaskFile.load("a", write(tmp_path, json.dumps({**CHOICE, "answer": 1})))
    assert choice.records == (
        ChoiceRecord(line=1, prompt="2+2=", choices=("4", "5"), answer=1),
    )
    assert choice.records[0].calibration_text == "2+2=5"


def test_byte_order_mark_crlf_line_separators_and_trailing_lines_are_accepted(
    tmp_path: Path,
) -> None:
    path = tmp_path / "task.jsonl"
    path.write_bytes('\ufeff{"text": "a\u2028b"}\r\n{"text": "c"}\r\n\r\n'.encode())
    assert [r.calibration_text for r in TaskFile.load("a", path).records] == ["a\u2028b", "c"]


@given(st.lists(UNICODE, min_size=1, max_size=5), st.booleans())
def test_any_text_survives(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], ascii_only: bool
) -> None:
    path = tmp_path_factory.mktemp("task") / "task.jsonl"
    path.write_text(
        "\n".join(json.dumps({"text": text}, ensure_ascii=ascii_only) for text in texts),
        encoding="utf-8",
        newline="",
    )
    assert [record.calibration_text for record in TaskFile.load("a", path).records] == texts


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ('{"text": "x"', "broken JSON"),
        ("[1]", "a list"),
        ('"text"', "a string"),
        ("null", "null"),
        ("", "empty line"),
        ('{"text": 3}', '"text" must be a string, got the number 3'),
        ('{"text": null}', '"text" must be a string, got null'),
        ('{"text": ""}', '"text" must not be empty'),
        ('{"text": "\\ud800"}', "lone surrogate U\\+D800"),
        ('{"text": "x", "text": "y"}', "keys must differ"),
        ('{"text": "x", "label": 1}', r"unknown keys, got \['label', 'text'\]"),
        ("{}", "unknown keys"),
        ("[" * 100_000, "refuses to read"),
        ('{"text": ' + "1" * 5000 + "}", "refuses to read"),
        ('{"prompt": "p"}', "unknown keys"),
        ('{"prompt": "p", "completion": ""}', '"completion" must not be empty'),
        (json.dumps({**CHOICE, "answer": 2}), r"in \[0, 2\) for 2 choices, got 2"),
        (json.dumps({**CHOICE, "answer": -1}), "got -1"),
        (json.dumps({**CHOICE, "answer": True}), "a boolean"),
        (json.dumps({**CHOICE, "answer": "4"}), "a string"),
        (json.dumps({**CHOICE, "answer": 0.0}), "the number 0.0"),
        (json.dumps({**CHOICE, "choices": "45"}), '"choices" must be a list'),
        (json.dumps({**CHOICE, "choices": ["4"]}), "two or more different"),
        (json.dumps({**CHOICE, "choices": ["4", "4"]}), "two or more different"),
        (json.dumps({**CHOICE, "choices": ["4", 5]}), r'"choices"\[1\] must be a string'),
        ('{"prompt": "p", "completion": "c"}', "got a completion line where line 1 is a text"),
        (b'{"text": "caf\xe9"}', "UTF-8, got byte 0xe9 at column 14"),
    ],
)
def test_bad_lines_are_refused_with_their_number(
    tmp_path: Path, line: str | bytes, rule: str
) -> None:
    path = write(tmp_path, '{"text": "fine"}', line, '{"text": "fine"}')
    with pytest.raises(TaskFileError, match=rf"task\.jsonl, line 2: .*{rule}"):
        TaskFile.load("a", path)


def test_bad_files_and_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TaskFileError, match="empty file"):
        TaskFile.load("a", write(tmp_path, "", " "))
    with pytest.raises(TaskFileError, match="No such file"):
        TaskFile.load("a", tmp_path / "none.jsonl")
    with pytest.raises(TaskFileError, match="directory"):
        TaskFile.load("a", tmp_path)
    path = write(tmp_path, '{"text": "x"}')
    for argument in ("a", "a=", f"../a={path}", f"={path}", f"a b={path}"):
        with pytest.raises(TaskFileError, match="must be"):
            split_task_arguments([argument])
    with pytest.raises(TaskFileError, match="'a' twice"):
        split_task_arguments([f"a={path}", f"a={path}"])
    assert split_task_arguments([f"a={path}", f"b={path}"]) == {"a": path, "b": path}
