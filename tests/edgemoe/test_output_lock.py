"""One output has one writer, whichever way it writes, and nothing is left of its lock."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING

import pytest

from edgemoe.errors import OutputError
from edgemoe.output_lock import claimed
from edgemoe.staging import reserved, staged_directory, staged_file

if TYPE_CHECKING:
    from pathlib import Path


def hold_in_another_process(target: Path) -> subprocess.Popen[str]:
    script = f"""
        import sys, pathlib
        from edgemoe.output_lock import claimed
        with claimed(pathlib.Path({str(target)!r})):
            print("held", flush=True)
            sys.stdin.read()
    """
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_another_process_is_refused_until_it_ends_however_it_ends(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with hold_in_another_process(target) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        for write in (staged_directory, staged_file):
            with pytest.raises(OutputError, match="one command at a time"), write(target):
                raise AssertionError
        with (
            pytest.raises(OutputError, match="Wait for it, or choose another -o"),
            reserved(target, force=True, directory=True),
        ):
            raise AssertionError
        with staged_file(tmp_path / "other") as staged:
            staged.touch()
        holder.kill()
    with staged_directory(target):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]


def test_one_thread_may_hold_it_again(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with (
        reserved(target, force=False, directory=False),
        claimed(tmp_path / "." / "out") as is_first,
        staged_file(target) as staged,
    ):
        assert not is_first
        staged.write_text("content")
    assert target.read_text() == "content"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_does_not_exist_is_not_made(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match=r"folder must exist.*mkdir -p '.*/a b/c'"),
        reserved(tmp_path / "a b" / "c" / "out", force=False, directory=True),
    ):
        raise AssertionError
    assert list(tmp_path.iterdir()) == []
