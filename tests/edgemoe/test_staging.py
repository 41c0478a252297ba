"""Output is whole or absent, whatever happens between the renames."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from edgemoe.errors import OutputError
from edgemoe.staging import refuse_inputs_inside, staged_directory, staged_file

if TYPE_CHECKING:
    from pathlib import Path


def fill(folder: Path, content: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "content").write_text(content)
    return folder


def write_directory(
    target: Path,
    content: str,
    *,
    force: bool = False,
    failure: type[BaseException] | None = None,
) -> None:
    with staged_directory(target, force=force) as staged:
        (staged / "content").write_text(content)
        if failure is not None:
            raise failure


def dead_process() -> int:
    """Return the id of a process that has ended."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_a_directory_is_replaced_whole(tmp_path: Path) -> None:
    target = fill(tmp_path / "out", "old")
    with pytest.raises(OutputError, match="--force"):
        write_directory(target, "new")
    write_directory(target, "new", force=True)
    assert (target / "content").read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_what_was_there(tmp_path: Path, failure: type[BaseException]) -> None:
    target = fill(tmp_path / "out", "old")
    with pytest.raises(failure):
        write_directory(target, "half", force=True, failure=failure)
    assert (target / "content").read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]
    with pytest.raises(failure):
        write_directory(tmp_path / "deep" / "er" / "out", "half", failure=failure)
    assert list(tmp_path.iterdir()) == [target], "parents that were made go again"


@pytest.mark.parametrize("failing", [0, 1])
def test_an_interruption_between_the_renames_puts_the_old_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    target = fill(tmp_path / "out", "old")
    path_type = type(target)
    rename, calls = path_type.rename, iter(range(9))

    def interrupted(self: Path, other: Path) -> Path:
        if next(calls) == failing:
            raise KeyboardInterrupt
        return rename(self, other)

    monkeypatch.setattr(path_type, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_directory(target, "new", force=True)
    assert (target / "content").read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_what_a_killed_process_left_is_swept_or_put_back(tmp_path: Path) -> None:
    target, owner = tmp_path / "out [1]", dead_process()
    fill(tmp_path / f".{target.name}.{owner}-aa.edgemoe-staged", "half")
    fill(tmp_path / f".{target.name}.{owner}-aa-old.edgemoe-staged", "old")
    # Its process is there, but who holds the output is its only writer: the id was given again.
    fill(tmp_path / f".{target.name}.{os.getppid()}-bb.edgemoe-staged", "half")
    # Killed between the two renames: the old directory is the target's only copy.
    with pytest.raises(OutputError, match="must not exist"):
        write_directory(target, "new")
    assert (target / "content").read_text() == "old"
    write_directory(target, "new", force=True)
    assert (target / "content").read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_a_file_never_replaces_a_directory_nor_the_other_way(tmp_path: Path) -> None:
    folder = fill(tmp_path / "folder", "old")
    (tmp_path / "file").write_text("old")
    with (
        pytest.raises(OutputError, match="must be a file"),
        staged_file(folder, force=True) as staged,
    ):
        staged.write_text("new")
    with pytest.raises(OutputError, match="must be a directory"):
        write_directory(tmp_path / "file", "new", force=True)
    assert (folder / "content").read_text() == (tmp_path / "file").read_text() == "old"


def test_inputs_survive(tmp_path: Path) -> None:
    model = fill(tmp_path / "demo" / "moe", "weights")
    for output in (model, tmp_path / "demo", tmp_path / "demo" / ".." / "demo"):
        with pytest.raises(OutputError, match="must not contain what is read"):
            refuse_inputs_inside(output, tmp_path / "plan.json", model)
    refuse_inputs_inside(tmp_path / "demo" / "other", model)


def test_failures_of_inputs_are_not_blamed_on_the_output(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), staged_directory(tmp_path / "out"):
        (tmp_path / "source" / "tokenizer.json").read_bytes()
    (tmp_path / "closed").mkdir(mode=0o500)
    if os.geteuid() != 0:
        with pytest.raises(OutputError, match="could not be written"):
            write_directory(tmp_path / "closed" / "out", "new")
