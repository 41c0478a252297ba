"""One writer of an output at a time.

Two commands with one `-o` would each check that it is free, work for an hour, and the second
would take the place of the first. So a writer holds a lock beside its output,
`.NAME.edgemoe-lock`, from its first check to its last rename; another one is refused at once.
The lock is the system's (flock): it goes with the process, however that ends, and the file goes
with the lock.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgemoe.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

# Where unfinished work of an output is kept (edgemoe.resume), which has a lock of its own.
WORK_SUFFIX = ".partial"
_SUFFIX = ".edgemoe-lock"
_HELD = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}


@dataclass
class _Claim:
    """An output that this process writes.

    Attributes:
        thread: The thread that holds it.
        depth: How many blocks do.
        announce: Told of the finished copy just before it becomes the output.
    """

    thread: int
    depth: int = 0
    announce: Callable[[Path], None] | None = None


_claims: dict[str, _Claim] = {}
_guard = threading.Lock()


@contextlib.contextmanager
def claimed(target: Path) -> Iterator[bool]:
    """Hold an output; blocks of one thread may hold it within each other.

    Args:
        target: The file or directory that will be written. Its parent exists.

    Yields:
        Whether this block is the outermost, so that nobody else can be at work for it.

    Raises:
        OutputError: Another process or thread holds it, or its lock cannot be made.
    """
    if any(parent.name.endswith(WORK_SUFFIX) for parent in target.absolute().parents):
        # Whoever holds the work has all that is in it.
        yield True
        return
    name = _name(target)
    with _guard:
        claim = _claims.get(name)
        if claim is not None and claim.thread != threading.get_ident():
            raise _taken(target)
        outermost = claim is None
        if claim is None:
            claim = _claims[name] = _Claim(threading.get_ident())
        claim.depth += 1
    try:
        if outermost:
            with _locked(target):
                yield True
        else:
            yield False
    finally:
        with _guard:
            claim.depth -= 1
            if not claim.depth:
                del _claims[name]


@contextlib.contextmanager
def announcing(target: Path, announce: Callable[[Path], None]) -> Iterator[None]:
    """Have someone told of a finished copy of a claimed output, just before it is renamed.

    Args:
        target: The output, held by this thread.
        announce: Called with the finished copy.

    Yields:
        Nothing.
    """
    claim = _claims.get(_name(target)) or _Claim(threading.get_ident())
    before, claim.announce = claim.announce, announce
    try:
        yield
    finally:
        claim.announce = before


def announce_finished(staged: Path, target: Path) -> None:
    """Tell whoever asked for it that a copy is finished and will be the output.

    Args:
        staged: The copy.
        target: The output.
    """
    claim = _claims.get(_name(target))
    if claim is not None and claim.announce is not None:
        claim.announce(staged)


def _name(target: Path) -> str:
    return str(target.parent.resolve() / target.name)


def open_lock(path: Path) -> int | None:
    """Open a file as a lock and hold it.

    Args:
        path: The file; it is made where it is missing. Links are not followed.

    Returns:
        Its descriptor, to be closed; None where another process holds it.

    Raises:
        OSError: It is a link or no regular file, or the disk refuses.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    descriptor = os.open(path, flags, 0o600)
    try:
        _refuse_no_file(descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno in _HELD:
            return None
        raise
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _refuse_no_file(descriptor: int) -> None:
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        raise OSError(errno.EINVAL, "it is no regular file")


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[None]:
    path = target.with_name(f".{target.name}{_SUFFIX}")
    descriptor = _open_current(path, target)
    try:
        yield
    finally:
        # While it is held: who waits for the name then makes a new file.
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(descriptor)


def _open_current(path: Path, target: Path) -> int:
    while True:
        try:
            descriptor = open_lock(path)
        except OSError as error:
            raise OutputError(
                f"{target} could not be written: {error.strerror} ({path.name}). Choose "
                "another -o."
            ) from error
        if descriptor is None:
            raise _taken(target)
        # Whoever held it may have removed the name in between.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.lstat(path)):
                return descriptor
        os.close(descriptor)


def _taken(target: Path) -> OutputError:
    return OutputError(
        f"one command at a time may write {target}, got another that does. Wait for it, or "
        "choose another -o."
    )
