"""Write whole or not at all: stage beside the target, sync, rename.

A reader never sees a half-written file or directory, and an interrupted or failed
command leaves nothing behind: the staged copy is removed on any exception, and staged
copies of processes that were killed are swept away by the next writer of the same target.
One command at a time writes a target: `edgemoe.output_lock`.
"""

from __future__ import annotations

import contextlib
import glob
import os
import secrets
import shlex
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from edgemoe.disk import describe_full
from edgemoe.errors import EdgemoeError, OutputError
from edgemoe.interruption import end_if_asked
from edgemoe.output_lock import WORK_SUFFIX, announce_finished, claimed
from edgemoe_runtime.messages import clip, escape_controls

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_STAGED_SUFFIX = ".edgemoe-staged"
_OLD = "-old"


@contextlib.contextmanager
def reserved(
    target: Path | None,
    *,
    force: bool,
    directory: bool,
    inputs: Iterable[Path] = (),
    resumes: bool = False,
) -> Iterator[None]:
    """Hold an output from a command's first check to its last rename.

    Args:
        target: File or directory that will be written; None where none will.
        force: Whether an existing target may be replaced.
        directory: Whether a directory is to be written, or a file.
        inputs: Files and directories that are read.
        resumes: Whether the command goes on with unfinished work of an earlier run, which may
            have ended just after its output appeared.

    Yields:
        Nothing; until the block ends no other command can write the target.

    Raises:
        OutputError: As `refuse_existing` and `refuse_inputs_inside`; the folder that it goes
            into is missing; or another command writes it.
    """
    if target is None:
        yield
        return
    refuse_missing_parent(target)
    with claimed(target) as is_first:
        recover(target, held=is_first)
        _sweep(target, held=is_first)
        refuse_existing(target, force=force, directory=directory, resumes=resumes)
        refuse_inputs_inside(target, *inputs)
        yield


def refuse_missing_parent(target: Path) -> None:
    """Refuse a target in a folder that does not exist: a slip of the pen would make one.

    Args:
        target: File or directory that is to be written.

    Raises:
        OutputError: Its parent is missing, or a file.
    """
    parent = target.absolute().parent
    if not parent.exists():
        shown = clip(shlex.quote(escape_controls(str(target.parent))))
        raise OutputError(
            f"the output's folder must exist, got {shown}, which does not. Make it first: "
            f"mkdir -p {shown}"
        )


def refuse_existing(
    target: Path, *, force: bool, directory: bool, resumes: bool = False
) -> None:
    """Refuse a target that exists, unless forced, and one of the other kind always.

    Args:
        target: File or directory that is to be written.
        force: Whether an existing target may be replaced.
        directory: Whether a directory is to be written, or a file.
        resumes: Whether the command goes on with unfinished work of an earlier run, which may
            have ended just after its output appeared: `edgemoe.resume` looks then.

    Raises:
        OutputError: `target` exists and `force` is false or it is of the other kind, or
            its parent is a file.
    """
    force = force or (resumes and target.with_name(target.name + WORK_SUFFIX).exists())
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


@contextlib.contextmanager
def staged_directory(target: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield an empty directory that becomes `target` when the block ends well.

    Args:
        target: Directory to write.
        force: Whether an existing `target` may be replaced.

    Yields:
        A new empty directory beside `target`.

    Raises:
        OutputError: `target` exists and `force` is false, or is a file, another command
            writes it, or the disk refuses (full, read-only).
    """
    with _staged(target, force=force, directory=True) as staged:
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
        OutputError: `target` exists and `force` is false, or is a directory, another command
            writes it, or the disk refuses (full, read-only).
    """
    with _staged(target, force=force, directory=False) as staged:
        yield staged
        sync(staged)
        replace(staged, target)


@contextlib.contextmanager
def _staged(target: Path, *, force: bool, directory: bool) -> Iterator[Path]:
    staged = (
        target.parent / f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}{_STAGED_SUFFIX}"
    )
    made = [parent for parent in target.parents if not parent.exists()]
    try:
        refuse_existing(target, force=force, directory=directory)
        target.parent.mkdir(parents=True, exist_ok=True)
        with claimed(target) as is_first:
            recover(target, held=is_first)
            refuse_existing(target, force=force, directory=directory)
            _sweep(target, held=is_first)
            try:
                yield staged
            finally:
                _remove(staged)
    except EdgemoeError:
        raise
    except Exception as error:
        reason = _output_failure(error, staged, target)
        if reason is None:
            raise
        raise OutputError(
            f"{target} could not be written: {reason}. Nothing was left behind; free space or "
            "choose another -o."
        ) from error
    finally:
        for parent in made:
            # Only those that stayed empty go.
            with contextlib.suppress(OSError):
                parent.rmdir()


def _output_failure(error: BaseException, staged: Path, target: Path) -> str | None:
    """Return the system's words where an error is of the output, not of an input."""
    full = describe_full(error)
    if full is not None or not isinstance(error, OSError) or error.filename is None:
        return full
    path = Path(os.fsdecode(error.filename))
    if path in (target, *target.parents, staged) or staged in path.parents:
        return error.strerror
    return None


def _stale(target: Path, *, held: bool) -> Iterator[Path]:
    """Yield staged copies of this user's that nobody writes any more.

    Where the target is held they are all such; otherwise those whose process is gone.
    """
    for path in target.parent.glob(f".{glob.escape(target.name)}.*{_STAGED_SUFFIX}"):
        owner = path.name[len(target.name) + 2 :].split("-", 1)[0]
        if (
            owner.isdigit()
            and path.lstat().st_uid == os.geteuid()
            and (held or (Path("/proc/self").exists() and not Path("/proc", owner).exists()))
        ):
            yield path


def _sweep(target: Path, *, held: bool) -> None:
    for stale in _stale(target, held=held):
        _remove(stale)


def recover(target: Path, *, held: bool = False) -> None:
    """Put a directory back whose process was killed between the renames that replace it.

    Args:
        target: The directory.
        held: Whether this process alone may write it.
    """
    if target.exists() or target.is_symlink():
        return
    for stale in _stale(target, held=held):
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
    announce_finished(staged, target)
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
