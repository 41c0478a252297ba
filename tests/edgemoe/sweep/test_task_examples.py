"""No line judges that any calibration reads."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from edgemoe.errors import TaskFileError
from edgemoe.sweep.task_examples import check_judging, load_lines, write_lines
from edgemoe.tasks import TaskFile

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


def write(path: Path, rows: Sequence[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def texts(path: Path, lines: Sequence[object]) -> Path:
    return write(path, [{"text": f"line {line}"} for line in lines])


@given(
    st.lists(st.integers(0, 30), min_size=8, max_size=40),
    st.lists(st.integers(0, 30), min_size=8, max_size=40),
)
def test_lines_that_repeat_judge_nothing(
    tmp_path_factory: pytest.TempPathFactory, one: list[int], two: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("lines")
    given_lines = {"one": one, "two": two}
    paths = {name: texts(folder / name, lines) for name, lines in given_lines.items()}
    read = {
        line for lines in given_lines.values() for n, line in enumerate(lines, 1) if n % 4 != 0
    }
    expected = {
        name: [line for n, line in enumerate(lines, 1) if n % 4 == 0 and line not in read]
        for name, lines in given_lines.items()
    }
    if min(map(len, expected.values())) < 2:
        with pytest.raises(TaskFileError, match="held-out lines are calibration lines too"):
            load_lines(paths, {})
        return
    found = load_lines(paths, {})
    for name, lines in given_lines.items():
        judging = [record.calibration_text for record in found[name].held_out.records]
        assert judging == [f"line {line}" for line in expected[name]]
        assert found[name].left_out == len(lines) // 4 - len(judging)
        calibration = [record.calibration_text for record in found[name].calibration.records]
        assert not set(judging) & set(calibration)


def test_a_file_of_its_own_judges_and_all_lines_choose(tmp_path: Path) -> None:
    task = texts(tmp_path / "train", range(5))
    judging = texts(tmp_path / "test", range(3, 9))
    found = load_lines({"t": task}, {"t": judging})["t"]
    assert len(found.calibration.records) == 5
    assert [record.line for record in found.held_out.records] == [3, 4, 5, 6]
    assert found.left_out == 2
    with pytest.raises(TaskFileError, match="got 0: 5 of 5 held-out lines are calibration"):
        load_lines({"t": task}, {"t": task})


def test_short_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        TaskFileError, match=r"8 lines or more.*got 7\. Add lines, .*--held-out"
    ):
        load_lines({"t": texts(tmp_path / "t", range(7))}, {})
    words = Tokenizer(WordLevel({f"{n}": n for n in range(9)} | {"?": 9}, unk_token="?"))
    words.pre_tokenizer = Whitespace()
    lines = load_lines({"t": texts(tmp_path / "t", range(8))}, {})
    check_judging(lines, words, max_length=64, max_tokens=4, accept_few=True)
    with pytest.raises(TaskFileError, match=r"fewer than 20.*--accept-weak-evidence"):
        check_judging(lines, words, max_length=64, max_tokens=4)
    with pytest.raises(TaskFileError, match=r"2 lines or more.*got 1 in 3 tokens"):
        check_judging(lines, words, max_length=64, max_tokens=3, accept_few=True)


@pytest.mark.parametrize(
    "rows",
    [
        [{"text": 'a "quoted" line\u2028of two'}, {"text": "é"}],
        [{"prompt": "p", "completion": " c"}],
        [{"prompt": "p", "choices": ["a", "b"], "answer": 1}],
    ],
)
def test_lines_are_written_as_they_were(tmp_path: Path, rows: list[dict[str, object]]) -> None:
    task = TaskFile.load("t", write(tmp_path / "t", rows))
    write_lines(task, tmp_path / "copy")
    assert TaskFile.load("t", tmp_path / "copy").records == task.records
