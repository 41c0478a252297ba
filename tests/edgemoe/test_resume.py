from __future__ import annotations

import errno
import json
from typing import TYPE_CHECKING

import pytest

from edgemoe.errors import OutputError
from edgemoe.resume import ResumableInterrupt, partial_path, resumable, resume_key

if TYPE_CHECKING:
    from pathlib import Path

KEY = {"command": "test", "options": [1, 2]}
OTHER = {"command": "test", "options": [1]}


def work_until(target: Path, error: BaseException, *files: str) -> None:
    with resumable(target, KEY, "step") as work:
        for file in files:
            work.write(file, {"finished": 3})
        raise error


def test_work_goes_on_until_it_is_done(tmp_path: Path) -> None:
    target = tmp_path / "new" / "out"
    with pytest.raises(ResumableInterrupt, match="the same command goes on"):
        work_until(target, KeyboardInterrupt(), "step")
    with resumable(target, KEY, "step") as work:
        assert work.read("step") == {"finished": 3}
        assert work.read("other") is None

    assert list(target.parent.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("no")])
def test_what_ends_before_a_step_is_finished_leaves_nothing(
    tmp_path: Path, error: BaseException
) -> None:
    with pytest.raises(type(error)):
        work_until(tmp_path / "new" / "out", error, "other")

    assert list(tmp_path.iterdir()) == []


def test_other_work_is_refused_unless_forced(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(ValueError, match="stop"):
        work_until(target, ValueError("stop"), "step")
    with (
        pytest.raises(OutputError, match="with another options"),
        resumable(target, OTHER, "step"),
    ):
        raise AssertionError
    with resumable(target, OTHER, "step", force=True) as work:
        assert work.read("step") is None


def test_a_key_names_what_decides_and_work_of_another_layout_is_refused(
    tmp_path: Path,
) -> None:
    class Content:
        sha256 = "ab"

    class Files:
        def stamps(self) -> dict[str, list[int]]:
            return {"config.json": [7, 9]}

    key = resume_key(
        "test", Files(), tasks={"one": Content()}, teacher=None, versions={"peft": "1"}
    )
    assert key["checkpoint"] == {"config.json": [7, 9]}
    assert (key["tasks"], key["teacher"]) == ({"one": "ab"}, None)
    assert {"edgemoe", "torch", "transformers", "peft"} == key["versions"].keys()
    assert resume_key("test", "cd")["checkpoint"] == "cd"

    # What an earlier edgemoe left has no layout in its key.
    work = partial_path(tmp_path / "out")
    work.mkdir()
    (work / "progress.json").write_text("{}")
    old = {name: value for name, value in key.items() if name != "layout"}
    (work / "key.json").write_text(json.dumps(old))
    with (
        pytest.raises(OutputError, match=r"another layout\. Give that command again"),
        resumable(tmp_path / "out", key, "*progress.json"),
    ):
        raise AssertionError


def test_what_somebody_else_put_there_is_spared(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "precious").touch()

    with (
        pytest.raises(OutputError, match="did not put there"),
        resumable(tmp_path / "out", KEY, "step", force=True),
    ):
        raise AssertionError

    assert (tmp_path / "out.partial" / "precious").exists()


@pytest.mark.parametrize("key", [KEY, OTHER])
def test_two_processes_are_kept_apart(tmp_path: Path, key: dict[str, object]) -> None:
    with (
        resumable(tmp_path / "out", KEY, "step"),
        pytest.raises(OutputError, match="one process at a time"),
        resumable(tmp_path / "out", key, "step"),
    ):
        raise AssertionError


def test_a_full_disk_says_so(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OutputError, match=r"No space left .* Nothing was left behind"):
        work_until(tmp_path / "out", full)
