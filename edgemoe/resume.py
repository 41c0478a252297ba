"""Work that can be interrupted at any moment, even killed, and goes on where it was.

A long command keeps finished steps in `<output>.partial` beside its output, under a key that
says which work this is. The same command finds them and goes on; another one is refused. The
directory goes when the work is done, and when it ends before its first step is finished. A run
that was killed after its output had appeared, but before the directory was gone, is finished by
the same command too.

How such a directory is recognised and held says `edgemoe.work_directory`.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from edgemoe.disk import describe_full
from edgemoe.errors import EdgemoeError, OutputError
from edgemoe.output_lock import announcing, claimed
from edgemoe.staging import refuse_existing, replace, sync
from edgemoe.versions import library_versions
from edgemoe.work_directory import (
    PUBLISHED,
    WorkDirectory,
    create_work,
    is_there,
    locked,
    partial_path,
    read_key,
    refuse_foreign,
    remove_work,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

__all__ = [
    "ResumableInterrupt",
    "WorkDirectory",
    "partial_path",
    "publish",
    "resumable",
    "resume_key",
    "wait_until_free",
]

# Of what work directories hold: one of another layout cannot be gone on from.
_LAYOUT = 4


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
        OutputError: The output exists and `force` is false, the directory is of other work,
            another process uses it, or the disk refuses.
        ResumableInterrupt: Ctrl-C, once `progress` exists.
    """
    path = partial_path(target)
    made = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with claimed(target), _opened(path, target, key, progress, force=force) as work:
            with announcing(target, lambda staged: _note_published(work, staged)):
                yield work
            remove_work(path)
    finally:
        for parent in made:
            # Only those that stayed empty go.
            with contextlib.suppress(OSError):
                parent.rmdir()


@contextlib.contextmanager
def _opened(
    path: Path, target: Path, key: Mapping[str, Any], progress: str, *, force: bool
) -> Iterator[WorkDirectory]:
    """Hold the work directory, the old one or a new one."""
    if is_there(path):
        refuse_foreign(path)
        # Nobody may be at it.
        with locked(path):
            different = _differences(path, key)
            if different and _was_published(path, target):
                # That work is done: only its directory was left.
                remove_work(path)
            elif different and _is_begun(path, progress) and not force:
                raise OutputError(
                    "unfinished work must be finished by the command that began it, got "
                    f"{path} with another {', '.join(different)}. Give that command again, or "
                    "remove the directory, or pass --force to begin anew."
                )
            elif different:
                remove_work(path)
    if not is_there(path):
        refuse_existing(target, force=force, directory=target.is_dir())
        create_work(path, key)
    with locked(path):
        if _was_published(path, target):
            _take_back(path, target)
        refuse_existing(target, force=force, directory=target.is_dir())
        with _kept_or_cleaned(path, target, progress):
            yield WorkDirectory(path)


@contextlib.contextmanager
def _kept_or_cleaned(path: Path, target: Path, progress: str) -> Iterator[None]:
    """Keep what is finished when the work fails, and nothing where nothing is."""
    try:
        yield
    except BaseException as error:
        if not is_there(path):
            raise
        if not _is_begun(path, progress):
            remove_work(path)
            _tell_full(target, error, kept=False)
            raise
        if isinstance(error, KeyboardInterrupt):
            raise ResumableInterrupt(
                f"interrupted. What is finished is in {path}: the same command goes on from "
                "there."
            ) from error
        _tell_full(target, error, kept=True)
        raise


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
    for file in staged.rglob("*"):
        if file.is_file():
            sync(file)
    sync(staged)
    replace(staged, target)


def _differences(path: Path, key: Mapping[str, Any]) -> list[str]:
    """Return the names of what decides the result and is another than in the directory."""
    found = read_key(path) or {}
    wanted = json.loads(json.dumps(key))
    return sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))


def _note_published(work: WorkDirectory, staged: Path) -> None:
    found = staged.lstat()
    inside = staged.is_relative_to(work.path)
    work.write(
        PUBLISHED,
        {
            "device": found.st_dev,
            "inode": found.st_ino,
            "name": str(staged.relative_to(work.path)) if inside else None,
        },
    )


def _was_published(path: Path, target: Path) -> bool:
    """Tell whether the output is what the work in a directory became."""
    note = WorkDirectory(path).read(PUBLISHED)
    if note is None or not is_there(target):
        return False
    found = target.lstat()
    return (found.st_dev, found.st_ino) == (note.get("device"), note.get("inode"))


def _take_back(path: Path, target: Path) -> None:
    """Undo the last rename of a run that was killed after it: the same run does it again."""
    note = WorkDirectory(path).read(PUBLISHED)
    inner = None if note is None else note.get("name")
    if inner is None:
        # A file that is made again from its steps, to the same bytes.
        target.unlink()
        return
    place = path / inner
    shutil.rmtree(place, ignore_errors=True)
    target.rename(place)


def _is_free(path: Path) -> bool:
    try:
        with locked(path):
            return True
    except OutputError:
        return False


def _is_begun(path: Path, progress: str) -> bool:
    return any(True for _ in path.glob(progress))


def _tell_full(target: Path, error: BaseException, *, kept: bool) -> None:
    reason = None if isinstance(error, EdgemoeError) else describe_full(error)
    if reason is not None:
        left = "The same command goes on" if kept else "Nothing was left behind"
        raise OutputError(
            f"{target} could not be written: {reason}. {left}; free space or choose another -o."
        ) from error
