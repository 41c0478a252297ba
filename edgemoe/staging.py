"""Write whole or not at all: stage beside the target, sync, rename.

A reader never sees a half-written file or directory, and an interrupted or failed
command leaves nothing behind: the staged copy is removed on any exception, and staged
copies of processes that were killed are swept away by the next writer of the same target.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import secrets
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from edgemoe.errors import OutputError
from edgemoe.interruption import end_if_asked

if TYPE_CHECKING:
    from collections.abc import Iterator

_STAGED_SUFFIX = ".edgemoe-staged"
_OLD = "-old"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}


def refuse_existing(target: Path, *, force: bool, directory: bool) -> None:
    """Refuse a target that exists, unless forced, and one of the other kind always.

    Args:
        target: File or directory that is to be written.
        force: Whether an existing target may be replaced.
        directory: Whether a directory is to be written, or a file.

    Raises:
        OutputError: `target` exists and `force` is false or it is of the other kind, or
            its parent is a file.
    """
    if (target.exists() or target.is_symlink()) and not force:
        raise OutputError(
            f"output must not exist, got {target}. Choose another -o, or pass --force to "
            "replace it."
        )
    if target.exists() and target.is_dir() != directory:
        kinds = ("a file", "the directory") if target.is_dir() else ("a directory", "the file")
        raise OutputError(
            f"output must be {kinds[0]}, got {kinds[1]} {target}. Choose another -o."
        )
    for parent in target.absolute().parents:
        if parent.exists():
            if not parent.is_dir():
                raise OutputError(
                    f"output's parent must be a directory, got the file {parent}."
                )
            break


def refuse_inputs_inside(target: Path, *inputs: Path) -> None:
    """Refuse to replace a directory by what is made from it, or from something in it.

    Args:
        target: Directory that is to be written.
        inputs: Files and directories that are read.

    Raises:
        OutputError: One of them is `target` or lies in it.
    """
    resolved = target.resolve()
    for path in inputs:
        if resolved in (path.resolve(), *path.resolve().parents):
            raise OutputError(
                f"output must not contain what is read, got {target} for {path}. Choose "
                "another -o."
            )


def require_space(directory: Path, needed_bytes: int) -> None:
    """Refuse early what the disk cannot hold.

    Args:
        directory: Where to write; need not exist yet.
        needed_bytes: What will be written.

    Raises:
        OutputError: Less is free.
    """
    existing = next(
        path for path in (directory, *directory.absolute().parents) if path.exists()
    )
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise OutputError(
            f"the disk of {directory} must have {needed_bytes / 1e6:.0f} MB free, got "
            f"{free / 1e6:.0f} MB. Free space, or choose another -o or a lower --precision."
        )


@contextlib.contextmanager
def staged_directory(target: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield an empty directory that becomes `target` when the block ends well.

    Args:
        target: Directory to write.
        force: Whether an existing `target` may be replaced.

    Yields:
        A new empty directory beside `target`.

    Raises:
        OutputError: `target` exists and `force` is false, or is a file, or the disk
            refuses (full, read-only).
    """
    recover(target)
    refuse_existing(target, force=force, directory=True)
    with _staged(target) as staged:
        staged.mkdir()
        yield staged
        for path in staged.rglob("*"):
            if path.is_file():
                sync(path)
        sync(staged)
        replace(staged, target)


@contextlib.contextmanager
def staged_file(target: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a path whose file becomes `target` when the block ends well.

    Args:
        target: File to write.
        force: Whether an existing `target` may be replaced.

    Yields:
        A path beside `target` that does not exist yet.

    Raises:
        OutputError: `target` exists and `force` is false, or is a directory, or the disk
            refuses (full, read-only).
    """
    refuse_existing(target, force=force, directory=False)
    with _staged(target) as staged:
        yield staged
        sync(staged)
        replace(staged, target)


@contextlib.contextmanager
def _staged(target: Path) -> Iterator[Path]:
    staged = (
        target.parent / f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}{_STAGED_SUFFIX}"
    )
    made = [parent for parent in target.parents if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target)
        yield staged
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        if error.errno is None or not _is_output_failure(error, staged, target):
            raise
        raise OutputError(
            f"{target} could not be written: {error.strerror}. Nothing was left behind; free "
            "space or choose another -o."
        ) from error
    finally:
        _remove(staged)
        for parent in made:
            # Only those that stayed empty go.
            with contextlib.suppress(OSError):
                parent.rmdir()


def _is_output_failure(error: OSError, staged: Path, target: Path) -> bool:
    if error.errno in _FULL:
        return True
    if error.filename is None:
        return False
    path = Path(error.filename)
    return path in (target, *target.parents, staged) or staged in path.parents


def _stale(target: Path) -> Iterator[Path]:
    """Yield staged copies whose process is gone."""
    for path in target.parent.glob(f".{glob.escape(target.name)}.*{_STAGED_SUFFIX}"):
        owner = path.name[len(target.name) + 2 :].split("-", 1)[0]
        if (
            owner.isdigit()
            and not Path("/proc", owner).exists()
            and Path("/proc/self").exists()
        ):
            yield path


def _sweep(target: Path) -> None:
    for stale in _stale(target):
        _remove(stale)


def recover(target: Path) -> None:
    """Put a directory back whose process was killed between the renames that replace it.

    Args:
        target: The directory.
    """
    if target.exists() or target.is_symlink():
        return
    for stale in _stale(target):
        if stale.name.endswith(_OLD + _STAGED_SUFFIX):
            stale.rename(target)
            return


def replace(staged: Path, target: Path) -> None:
    """Rename a finished file or directory to its target, replacing what is there.

    Args:
        staged: A staged copy beside `target`.
        target: What it becomes.

    Raises:
        KeyboardInterrupt: Someone asked the command to end, and Python forgot it.
    """
    end_if_asked()
    if target.is_dir() and not target.is_symlink():
        # rename(2) cannot replace a directory that is not empty.
        stem = f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}"
        old = target.with_name(stem + _OLD + _STAGED_SUFFIX)
        try:
            target.rename(old)
            staged.rename(target)
        except BaseException:
            if old.exists() and not target.exists():
                old.rename(target)
            raise
        _remove(old)
    else:
        staged.replace(target)
    sync(target.parent)


def sync(path: Path) -> None:
    """Wait until a file or a directory has reached the disk.

    Args:
        path: The file or directory.
    """
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
