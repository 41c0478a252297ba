"""Files and JSON that somebody else may have written: one way to read them for all packages."""

from __future__ import annotations

import errno
import json
import os
import stat
from typing import TYPE_CHECKING, Any, NoReturn

from edgemoe_runtime.messages import quote

if TYPE_CHECKING:
    from pathlib import Path

_KINDS = (
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


def require_regular(path: Path) -> os.stat_result:
    """Refuse what would be waited for or never end when it is opened, before it is opened.

    Args:
        path: a file, or a link to one.

    Returns:
        Its status.

    Raises:
        OSError: there is none, or it is a directory, a pipe, a socket or a device.
    """
    status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    for is_kind, name in _KINDS:
        if is_kind(status.st_mode):
            raise OSError(errno.EINVAL, f"it must be a regular file, got {name}", str(path))
    return status


def read_file(path: Path, max_bytes: int | None = None) -> bytes:
    """Read a regular file whole.

    Args:
        path: the file, or a link to it.
        max_bytes: most bytes to read; None reads all.

    Returns:
        Its bytes.

    Raises:
        OSError: it cannot be read, is no regular file, or is longer.
    """
    require_regular(path)
    with path.open("rb") as file:
        data = file.read() if max_bytes is None else file.read(max_bytes + 1)
    if max_bytes is not None and len(data) > max_bytes:
        raise OSError(errno.EFBIG, f"it must be at most {max_bytes} bytes, got more", str(path))
    return data


def parse_strict(text: str | bytes, *, infinities: bool = False) -> Any:
    """Parse JSON that repeats no key and holds finite numbers.

    Args:
        text: the document; bytes must be UTF-8.
        infinities: whether `Infinity` and `-Infinity` are read: Python writes them, and
            config.json of published checkpoints has them where a limit is open.

    Returns:
        Its value.

    Raises:
        ValueError: it is none, not UTF-8, nested too deeply, repeats a key, or has NaN.
    """

    def refuse_constant(name: str) -> float:
        if infinities and name != "NaN":
            return float(name.replace("Infinity", "inf"))
        raise ValueError(f"numbers must be finite, got {name}")

    if isinstance(text, bytes):
        text = text.decode("utf-8")
    try:
        return json.loads(
            text, object_pairs_hook=_refuse_repeated, parse_constant=refuse_constant
        )
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _refuse_repeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        _raise_repeated([key for key, _ in pairs])
    return found


def _raise_repeated(keys: list[str]) -> NoReturn:
    seen: set[str] = set()
    twice = next(key for key in keys if key in seen or seen.add(key))  # type: ignore[func-returns-value]
    raise ValueError(f"keys must differ, got {quote(twice, 80)} twice")
