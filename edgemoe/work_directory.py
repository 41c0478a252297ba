"""Folders of unfinished work: made, recognised, locked and removed.

A folder is for its user alone: it can hold the calibration's text. One that edgemoe did not
make is never used or removed: edgemoe's has a random token in two of its files. Links are not
followed, neither for the folder nor for its lock.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import secrets
import shutil
import stat
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgemoe.errors import OutputError
from edgemoe.output_lock import WORK_SUFFIX, open_lock
from edgemoe.staging import sync

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_KEY = "key.json"
_MARK = "edgemoe-work"
_LOCK = "lock"
_NEW = ".new"
_TOKEN_LENGTH = 64
# Which file or directory was about to become the output.
PUBLISHED = "published.json"
_KEPT_TO_THE_END = (_KEY, _MARK, _LOCK, PUBLISHED)


class WorkDirectory:
    """Finished steps of one piece of work.

    Attributes:
        path: The directory.
    """

    def __init__(self, path: Path) -> None:
        """Use an existing directory.

        Args:
            path: The directory.
        """
        self.path = path

    def read(self, name: str) -> dict[str, Any] | None:
        """Read what `write` wrote.

        Args:
            name: File name.

        Returns:
            The object; None where there is none.
        """
        file = self.path / name
        if not file.exists():
            return None
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return found

    def write(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a JSON object, whole or not at all; what was written before it is kept too.

        Args:
            name: File name.
            content: JSON values.
        """
        self.write_bytes(name, (json.dumps(content, indent=1) + "\n").encode())

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write a file, whole or not at all.

        Args:
            name: File name.
            content: Its bytes.
        """
        new = self.path / (name + _NEW)
        new.write_bytes(content)
        self.commit(new, name)

    def commit(self, new: Path, name: str) -> None:
        """Give a finished file its name, once it has reached the disk.

        Args:
            new: A file in the directory.
            name: Its name from now on.
        """
        sync(new)
        new.rename(self.path / name)
        sync(self.path)

    def empty_directory(self, name: str) -> Path:
        """Make a directory, or empty it.

        Args:
            name: Its name.

        Returns:
            The directory.
        """
        directory = self.path / name
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        return directory

    def remove(self, name: str) -> None:
        """Remove a file or a directory, if there is one.

        Args:
            name: Its name.
        """
        path = self.path / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def partial_path(target: Path) -> Path:
    """Name the work directory of an output.

    Args:
        target: The output.

    Returns:
        The directory, which need not exist.
    """
    return target.with_name(target.name + WORK_SUFFIX)


def create_work(path: Path, key: Mapping[str, Any]) -> None:
    """Make a work directory, whole or not at all.

    Args:
        path: Where.
        key: Which work it is of, as JSON values.
    """
    new = path.with_name(f".{path.name}.{os.getpid()}{_NEW}")
    _sweep(path)
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(mode=0o700)
    token = secrets.token_hex(_TOKEN_LENGTH // 2)
    work = WorkDirectory(new)
    work.write_bytes(_MARK, _mark(token))
    work.write(_KEY, {"token": token, "key": key})
    new.rename(path)


def remove_work(path: Path) -> None:
    """Remove a work directory; killed at any moment, what is left is still known as one.

    Args:
        path: The directory, which edgemoe made.
    """
    for inner in path.iterdir():
        if inner.name not in _KEPT_TO_THE_END:
            _remove(inner)
    last = path.with_name(f".{path.name}.{os.getpid()}{_NEW}")
    shutil.rmtree(last, ignore_errors=True)
    path.rename(last)
    shutil.rmtree(last, ignore_errors=True)
    _sweep(path)


def _sweep(path: Path) -> None:
    """Remove what killed processes left of making or removing a directory."""
    for stale in path.parent.glob(f".{glob.escape(path.name)}.*{_NEW}"):
        owner = stale.name.split(".")[-2]
        is_ours = stale.lstat().st_uid == os.geteuid()
        if is_ours and owner.isdigit() and not Path("/proc", owner).exists():
            shutil.rmtree(stale, ignore_errors=True)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _mark(token: str) -> bytes:
    return f"Unfinished work of edgemoe. {token}\n".encode()


def is_there(path: Path) -> bool:
    """Return whether a path is taken, be it by a link to nothing."""
    return path.exists() or path.is_symlink()


def refuse_foreign(path: Path) -> None:
    """Refuse a path that is no work directory of this user's.

    Args:
        path: Where unfinished work would be.

    Raises:
        OutputError: It is a link or a file, of another user, or edgemoe did not make it.
    """
    found = path.lstat()
    reason = "something that edgemoe did not put there"
    if stat.S_ISDIR(found.st_mode):
        if found.st_uid != os.geteuid() and found.st_uid != _apparent_owner(path.parent):
            reason = "a folder of another user"
        elif read_key(path) is not None:
            return
    raise OutputError(
        f"{path} must be free for unfinished work, got {reason}. Move it, or choose another -o."
    )


def _apparent_owner(folder: Path) -> int:
    """Return who owns what this process makes: file systems of other machines may map users."""
    with tempfile.TemporaryFile(dir=folder) as made:
        return os.fstat(made.fileno()).st_uid


def read_key(path: Path) -> dict[str, Any] | None:
    """Read which work a directory is of.

    Args:
        path: The directory.

    Returns:
        What `create_work` was given; None where edgemoe did not make the directory.
    """
    try:
        found = WorkDirectory(path).read(_KEY)
        if not isinstance(found, dict):
            return None
        token = found["token"]
        mark = (path / _MARK).read_bytes()
    except (OSError, ValueError, LookupError):
        return None
    if not isinstance(token, str) or len(token) < _TOKEN_LENGTH or mark != _mark(token):
        return None
    key = found.get("key")
    return key if isinstance(key, dict) else {}


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a work directory.

    Args:
        path: The directory.

    Yields:
        Nothing.

    Raises:
        OutputError: Another process holds it, or its lock is no file.
    """
    try:
        descriptor = open_lock(path / _LOCK)
    except OSError as error:
        raise OutputError(
            f"{path / _LOCK} must be a file that can be locked, got: {error.strerror}. Remove "
            f"{path}, or choose another -o."
        ) from error
    if descriptor is None:
        raise OutputError(
            f"one process at a time may use {path}, got another that does. Wait for it, or "
            "choose another -o."
        )
    try:
        yield
    finally:
        os.close(descriptor)
