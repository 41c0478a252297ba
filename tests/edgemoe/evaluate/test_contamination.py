from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import pytest

from edgemoe.data_provenance import digest_line, write_digests
from edgemoe.errors import TaskFileError
from edgemoe.evaluate.contamination import POLICIES, examples_seen, keep_held_out
from edgemoe.tasks import TaskFile

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def task(tmp_path: Path) -> TaskFile:
    file = tmp_path / "task.jsonl"
    file.write_text("".join(f'{{"text": "line {number}"}}\n' for number in range(6)))
    return TaskFile.load("t", file)


def test_lines_that_were_read_are_refused_skipped_or_warned_of(task: TaskFile) -> None:
    digests = [digest_line(record) for record in task.records]
    read = {digests[2], digests[4], 12345}
    rule = r"not made from, got 2 of 6 lines \(the first is line 3\)"
    with pytest.raises(TaskFileError, match=rule + r".* skip judges the 4 that are left"):
        keep_held_out(task, read, "refuse", "the model")
    left, remark = keep_held_out(task, read, "skip", "the model")
    assert [record.line for record in left.records] == [1, 2, 4, 6]
    assert remark is None
    left, remark = keep_held_out(task, read, "warn", "the model")
    assert left == task
    assert re.search(rule, remark or "")
    for policy in POLICIES:
        assert keep_held_out(task, {12345}, policy, "the model") == (task, None)
        assert keep_held_out(task, (), policy, "the model") == (task, None)
    for policy in ("refuse", "skip"):
        with pytest.raises(TaskFileError, match=r"got 6 of 6 lines.* Use other lines\.$"):
            keep_held_out(task, digests, policy, "the model")


def test_what_was_made_from_lines_carries_them(tmp_path: Path) -> None:
    one, two, three = (write_digests([number]) for number in (1, 2, 3))
    chain = {"calibration_lines": one, "before": {"training_lines": two, "before": None}}
    config = tmp_path / "config.json"
    assert examples_seen(tmp_path, "a") == frozenset()
    config.write_text(json.dumps({"model_type": "mixtral", "edgemoe": {"provenance": chain}}))
    assert examples_seen(tmp_path, "a") == {1, 2}
    manifest = tmp_path / "manifest.json"
    plans = {"a": {"calibration_lines": three}, "b": chain, "c": None}
    tasks = {name: {"plan": plan} for name, plan in plans.items()}
    manifest.write_text(json.dumps({"tasks": tasks}))
    assert examples_seen(tmp_path, "a") == {3}
    assert examples_seen(tmp_path, "b") == {1, 2}
    assert examples_seen(tmp_path, "c") == examples_seen(tmp_path, "d") == frozenset()
    # A bundle of one graph answers for any task.
    manifest.write_text(json.dumps({"tasks": {"b": {"plan": chain}}}))
    assert examples_seen(tmp_path, "whatever") == {1, 2}
    manifest.write_text("{")
    config.write_text("[]")
    assert examples_seen(tmp_path, "a") == frozenset()
