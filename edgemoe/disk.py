"""Room on a disk: asked for before it is needed, and named when it ran out.

Python raises `OSError` with a number where a disk is full or a file may not grow any more.
Libraries that write themselves raise errors of their own classes: safetensors 0.8 its
`SafetensorError` with the number in the text, numpy 2 an `OSError` without a number, torch 2.13
a `RuntimeError` of its archive writer. All of them mean the same to a user.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from typing import TYPE_CHECKING

from edgemoe.errors import OutputError

if TYPE_CHECKING:
    from pathlib import Path

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}
# Rust's standard library writes `File too large (os error 27)`.
_NUMBER = re.compile(r"\(os error (\d+)\)")
_SHORT_WRITE = re.compile(r"\d+ requested and \d+ written")
# Of torch's archive writer; the first is what is left to say where a write came back short.
_ARCHIVE = re.compile(r"inline_container\.cc.*(unexpected pos|file write failed)", re.DOTALL)


def describe_full(error: BaseException) -> str | None:
    """Tell whether an error means that a disk takes no more.

    Args:
        error: What was raised.

    Returns:
        The system's words for it, such as "No space left on device"; None where it is
        something else.
    """
    if isinstance(error, OutputError):
        return None
    if isinstance(error, OSError):
        if error.errno in _FULL:
            return error.strerror or os.strerror(error.errno)
        if error.errno is None and _SHORT_WRITE.search(str(error)):
            return os.strerror(errno.ENOSPC)
        return None
    if type(error).__name__ == "SafetensorError":
        found = _NUMBER.search(str(error))
        return os.strerror(int(found[1])) if found and int(found[1]) in _FULL else None
    if isinstance(error, RuntimeError) and _ARCHIVE.search(str(error)):
        return os.strerror(errno.ENOSPC)
    return None


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
            f"the disk of {directory} must have {human_bytes(needed_bytes)} free, got "
            f"{human_bytes(free)}: {human_bytes(needed_bytes - free)} are missing. Free space, "
            "or choose another -o or a lower --precision."
        )


def human_bytes(count: float) -> str:
    """Write a size in powers of ten.

    Args:
        count: Bytes, not negative.

    Returns:
        The size with its unit, such as `93.1 MB`.
    """
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"
