"""Work that can be interrupted at any moment, even killed, and goes on where it was.

A long command keeps finished steps in `<output>.partial` beside its output, under a key that
says which work this is. The same command finds them and goes on; another one is refused. The
directory goes when the work is done, and when it ends before its first step is finished.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from edgemoe.errors import OutputError
from edgemoe.staging import refuse_existing, replace, sync
from edgemoe.versions import library_versions

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_SUFFIX = ".partial"
_KEY = "key.json"
_LOCK = "lock"
_NEW = ".new"
# Of what work directories hold: one of another layout cannot be gone on from.
_LAYOUT = 2
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}


class Stamped(Protocol):
    """Files whose change makes it other work: a checkpoint, or its hashes."""

    def stamps(self) -> Mapping[str, Sequence[int]]:
        """Return size in bytes and time of change in nanoseconds of each file, by name."""
        ...


def resume_key(command: str, checkpoint: Stamped | str, **parts: Any) -> dict[str, Any]:
    """Name all that decides the result of a piece of work.

    Args:
        command: What works.
        checkpoint: What it works on; the fingerprint where that is known.
        parts: What decides the result besides. Whatever has a `sha256` stands for its content,
            and a checkpoint for its files; all else is JSON values. `versions` adds to those
            of edgemoe and of what computes for it.

    Returns:
        JSON values, for `resumable`.
    """
    versions = {**library_versions(), **parts.pop("versions", {})}
    return {
        "command": command,
        "layout": _LAYOUT,
        "checkpoint": _as_json(checkpoint),
        **{name: _as_json(part) for name, part in parts.items()},
        "versions": versions,
    }


def _as_json(part: Any) -> Any:
    if hasattr(part, "stamps"):
        return part.stamps()
    if hasattr(part, "sha256"):
        return part.sha256
    if isinstance(part, Mapping):
        return {name: _as_json(one) for name, one in part.items()}
    if isinstance(part, (list, tuple)):
        return [_as_json(one) for one in part]
    return part


class ResumableInterrupt(KeyboardInterrupt):
    """Ctrl-C in work of which steps are finished; the text says how to go on."""


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
    return target.with_name(target.name + _SUFFIX)


def wait_until_free(target: Path, seconds: float) -> None:
    """Wait until no process works for an output.

    A worker whose parent was killed ends a moment later than its parent.

    Args:
        target: The output.
        seconds: How long to wait at most; who comes next is refused by `resumable`.
    """
    path = partial_path(target)
    end = time.monotonic() + seconds
    while path.exists() and not _is_free(path) and time.monotonic() < end:
        time.sleep(0.1)


@contextlib.contextmanager
def resumable(
    target: Path, key: Mapping[str, Any], progress: str, *, force: bool = False
) -> Iterator[WorkDirectory]:
    """Open the work directory of an output, that of an interrupted run if there is one.

    Args:
        target: The output that the work is for.
        key: What decides the work's result, as JSON values.
        progress: Name, or glob pattern, of what exists once a step is finished.
        force: Whether the work directory of other work may be thrown away.

    Yields:
        The directory. It is removed when the block ends well, or fails before `progress`
        exists.

    Raises:
        OutputError: The directory is of other work, another process uses it, or the disk
            refuses.
        ResumableInterrupt: Ctrl-C, once `progress` exists.
    """
    path = partial_path(target)
    made = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not _is_same_work(path, key, progress, force=force):
        shutil.rmtree(path)
    if not path.exists():
        _create(path, key)
    with _locked(path):
        try:
            yield WorkDirectory(path)
        except BaseException as error:
            if not _is_begun(path, progress):
                _clean(path, made)
                _tell_full(target, error, kept=False)
                raise
            if isinstance(error, KeyboardInterrupt):
                raise ResumableInterrupt(
                    f"interrupted. What is finished is in {path}: the same command goes on "
                    "from there."
                ) from error
            _tell_full(target, error, kept=True)
            raise
        shutil.rmtree(path, ignore_errors=True)


def publish(staged: Path, target: Path, *, force: bool) -> None:
    """Make a finished directory the output.

    Args:
        staged: The directory, on the same file system.
        target: Where it goes.
        force: Whether an existing directory may be replaced.

    Raises:
        OutputError: `target` exists and `force` is false.
    """
    refuse_existing(target, force=force, directory=True)
    for file in staged.iterdir():
        sync(file)
    sync(staged)
    replace(staged, target)


def _create(path: Path, key: Mapping[str, Any]) -> None:
    new = path.with_name(f".{path.name}.{os.getpid()}{_NEW}")
    for stale in path.parent.glob(f".{glob.escape(path.name)}.*{_NEW}"):
        owner = stale.name.split(".")[-2]
        if stale == new or not Path("/proc", owner).exists():
            shutil.rmtree(stale, ignore_errors=True)
    new.mkdir()
    WorkDirectory(new).write(_KEY, key)
    new.rename(path)


def _is_same_work(path: Path, key: Mapping[str, Any], progress: str, *, force: bool) -> bool:
    found = WorkDirectory(path).read(_KEY) if path.is_dir() else None
    if found is None:
        raise OutputError(
            f"{path} must be free for unfinished work, got something that edgemoe did not "
            "put there. Move it, or choose another -o."
        )
    wanted = json.loads(json.dumps(key))
    different = sorted(
        name for name in {*found, *wanted} if found.get(name) != wanted.get(name)
    )
    if different and _is_begun(path, progress) and not force:
        raise OutputError(
            f"unfinished work must be finished by the command that began it, got {path} with "
            f"another {', '.join(different)}. Give that command again, or remove the "
            "directory, or pass --force to begin anew."
        )
    if different:
        # Nobody may be at it.
        with _locked(path):
            return False
    return True


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with (path / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(
                f"one process at a time may use {path}, got another that does. Wait for it, "
                "or choose another -o."
            ) from error
        yield


def _is_free(path: Path) -> bool:
    try:
        with _locked(path):
            return True
    except OutputError:
        return False


def _is_begun(path: Path, progress: str) -> bool:
    return any(True for _ in path.glob(progress))


def _clean(path: Path, made: list[Path]) -> None:
    shutil.rmtree(path, ignore_errors=True)
    for parent in made:
        with contextlib.suppress(OSError):
            parent.rmdir()


def _tell_full(target: Path, error: BaseException, *, kept: bool) -> None:
    if isinstance(error, OSError) and error.errno in _FULL and type(error) is OSError:
        left = "The same command goes on" if kept else "Nothing was left behind"
        raise OutputError(
            f"{target} could not be written: {error.strerror}. {left}; free space or choose "
            "another -o."
        ) from error
