"""Write whole or not at all: stage beside the target, sync, rename.

A reader never sees a half-written file or directory, and an interrupted or failed
command leaves nothing behind: the staged copy is removed on any exception, and staged
copies of processes that were killed are swept away by the next writer of the same target.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from edgemoe.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Iterator

_STAGED_SUFFIX = ".edgemoe-staged"


def refuse_existing(target: Path, *, force: bool) -> None:
    """Refuse a target that exists, unless forced.

    Args:
        target: File or directory that is to be written.
        force: Whether an existing target may be replaced.

    Raises:
        OutputError: ``target`` exists and ``force`` is false, or its parent is a file.
    """
    if (target.exists() or target.is_symlink()) and not force:
        raise OutputError(
            f"output must not exist, got {target}. Choose another -o, or pass --force to "
            "replace it."
        )
    for parent in target.absolute().parents:
        if parent.exists():
            if not parent.is_dir():
                raise OutputError(
                    f"output's parent must be a directory, got the file {parent}."
                )
            break


@contextlib.contextmanager
def staged_directory(target: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield an empty directory that becomes ``target`` when the block ends well.

    Args:
        target: Directory to write.
        force: Whether an existing ``target`` may be replaced.

    Yields:
        A new empty directory beside ``target``.

    Raises:
        OutputError: ``target`` exists and ``force`` is false, or the disk refuses (full,
            read-only).
    """
    refuse_existing(target, force=force)
    with _staged(target) as staged:
        staged.mkdir()
        yield staged
        for path in staged.rglob("*"):
            if path.is_file():
                _sync(path)
        _sync(staged)
        _replace(staged, target)


@contextlib.contextmanager
def staged_file(target: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a path whose file becomes ``target`` when the block ends well.

    Args:
        target: File to write.
        force: Whether an existing ``target`` may be replaced.

    Yields:
        A path beside ``target`` that does not exist yet.

    Raises:
        OutputError: ``target`` exists and ``force`` is false, or the disk refuses (full,
            read-only).
    """
    refuse_existing(target, force=force)
    with _staged(target) as staged:
        yield staged
        _sync(staged)
        _replace(staged, target)


@contextlib.contextmanager
def _staged(target: Path) -> Iterator[Path]:
    staged = (
        target.parent / f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}{_STAGED_SUFFIX}"
    )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target)
        yield staged
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        if error.errno is None or not _is_output_failure(error, target):
            raise
        raise OutputError(
            f"{target} could not be written: {error.strerror}. Nothing was left behind; free "
            "space or choose another -o."
        ) from error
    finally:
        _remove(staged)


def _is_output_failure(error: OSError, target: Path) -> bool:
    import errno

    if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}:
        return True
    return error.filename is not None and str(target.parent) in str(error.filename)


def _sweep(target: Path) -> None:
    """Remove staged copies whose process is gone."""
    for stale in target.parent.glob(f".{target.name}.*{_STAGED_SUFFIX}"):
        owner = stale.name[len(target.name) + 2 :].split("-", 1)[0]
        if (
            owner.isdigit()
            and not Path("/proc", owner).exists()
            and Path("/proc/self").exists()
        ):
            _remove(stale)


def _replace(staged: Path, target: Path) -> None:
    if target.is_dir() and not target.is_symlink():
        # rename(2) cannot replace a directory that is not empty.
        old = staged.with_name(staged.name + "-old")
        target.rename(old)
        try:
            staged.rename(target)
        except OSError:
            old.rename(target)
            raise
        _remove(old)
    else:
        staged.replace(target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
