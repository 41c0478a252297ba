from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import pytest

from edgemoe import small_files
from edgemoe.small_files import read_once

if TYPE_CHECKING:
    from pathlib import Path


def test_a_file_is_opened_again_only_when_it_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "config.json"
    opened: list[Path] = []

    def read(path: Path) -> bytes:
        opened.append(path)
        return path.read_bytes()

    monkeypatch.setattr(small_files, "read_file", read)
    file.write_bytes(b"1")
    assert [read_once(file), read_once(file)] == [b"1", b"1"]
    assert len(opened) == 2, "written just now: nothing is kept"
    old = time.time() - 10
    os.utime(file, (old, old))
    assert [read_once(file) for _ in range(3)] == [b"1"] * 3
    assert len(opened) == 3
    file.write_bytes(b"2")
    assert read_once(file) == b"2"
    os.utime(file, (old, old))
    assert read_once(file) == b"2", "same size and time, but changed since"
    file.unlink()
    with pytest.raises(FileNotFoundError):
        read_once(file)
