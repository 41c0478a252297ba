from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import stat
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from edgemoe.errors import OutputError
from edgemoe.resume import ResumableInterrupt, partial_path, publish, resumable, resume_key
from edgemoe.staging import staged_file

if TYPE_CHECKING:
    from collections.abc import Mapping
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

    with (
        contextlib.suppress(ValueError),
        resumable(tmp_path / "out", {**key, "layout": 0}, "*progress.json") as work,
    ):
        work.write("progress.json", {})
        raise ValueError
    with (
        pytest.raises(OutputError, match=r"another layout\. Give that command again"),
        resumable(tmp_path / "out", key, "*progress.json"),
    ):
        raise AssertionError


@pytest.mark.parametrize("key", [None, "{}", '{"token": 1}', '{"token": "aa"}', "[1"])
def test_what_somebody_else_put_there_is_spared(tmp_path: Path, key: str | None) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "precious").touch()
    if key is not None:
        (tmp_path / "out.partial" / "key.json").write_text(key)

    with (
        pytest.raises(OutputError, match="did not put there"),
        resumable(tmp_path / "out", KEY, "step", force=True),
    ):
        raise AssertionError

    assert (tmp_path / "out.partial" / "precious").exists()


def test_links_are_not_followed(tmp_path: Path) -> None:
    """Neither where the folder would be, nor its lock, nor the output's."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    work_until_kept(tmp_path / "elsewhere")
    (tmp_path / "linked.partial").symlink_to(partial_path(tmp_path / "elsewhere"))
    with pytest.raises(OutputError, match="did not put there"):
        work_until_kept(tmp_path / "linked")
    work_until_kept(tmp_path / "out")
    lock = partial_path(tmp_path / "out") / "lock"
    lock.unlink()
    lock.symlink_to(victim)
    with pytest.raises(OutputError, match="can be locked"):
        work_until_kept(tmp_path / "out")
    (tmp_path / ".other.edgemoe-lock").symlink_to(victim)
    with pytest.raises(OutputError, match="could not be written"):
        work_until_kept(tmp_path / "other")
    assert victim.read_text() == "precious"


def work_until_kept(target: Path) -> None:
    with contextlib.suppress(ValueError):
        work_until(target, ValueError("stop"), "step")


def test_work_is_for_its_user_alone(tmp_path: Path) -> None:
    work_until_kept(tmp_path / "out")
    assert stat.S_IMODE(partial_path(tmp_path / "out").stat().st_mode) == 0o700


@pytest.mark.parametrize("directory", [True, False])
def test_a_run_that_was_killed_after_its_last_rename_is_finished_by_the_same(
    tmp_path: Path, directory: bool
) -> None:
    target = tmp_path / "out"

    def finish(content: str, key: Mapping[str, object] = KEY, *, kill: bool = False) -> None:
        with resumable(target, key, "step") as work:
            work.write("step", {})
            if directory:
                staged = work.path / "staged"
                staged.mkdir(exist_ok=True)
                (staged / "content").write_text(content)
                publish(staged, target, force=False)
            else:
                with staged_file(target) as staged:
                    staged.write_text(content)
            if kill:
                os.kill(os.getpid(), signal.SIGKILL)

    def killed() -> None:
        child = os.fork()
        if child == 0:
            finish("first", kill=True)
        os.waitpid(child, 0)
        assert target.exists()
        assert partial_path(target).exists()

    def read() -> str:
        return (target / "content" if directory else target).read_text()

    killed()
    finish("second")
    assert read() == "second"
    assert [file.name for file in tmp_path.iterdir()] == ["out"]

    _remove(target)
    killed()
    # Another command does not take the finished output away.
    with pytest.raises(OutputError, match="must not exist"):
        finish("other", OTHER)
    assert read() == "first"
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_two_that_write_one_output_are_kept_apart(tmp_path: Path) -> None:
    with (
        resumable(tmp_path / "out", KEY, "step"),
        ThreadPoolExecutor(1) as other,
        pytest.raises(OutputError, match="one command at a time"),
    ):
        other.submit(work_until, tmp_path / "out", ValueError(), "step").result()


def test_a_full_disk_says_so(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OutputError, match=r"No space left .* Nothing was left behind"):
        work_until(tmp_path / "out", full)
