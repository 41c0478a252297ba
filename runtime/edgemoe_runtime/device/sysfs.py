"""Read small files of /proc and /sys; what is absent or unreadable is None, never an error."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_MAX_BYTES = 1 << 16  # 64 KiB: these files hold a word or a page
_MOST = 1 << 63  # what the kernel prints fits into 64 bits


def read_text(path: Path) -> str | None:
    """Return a file's text without NULs and outer space, or None."""
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES)
    except OSError:
        # sensors vanish, sleep (EAGAIN) or want root: all that means is "not known"
        return None
    return data.decode("utf-8", errors="replace").replace("\0", "\n").strip()


def read_integer(path: Path) -> int | None:
    """Return a file's whole number, or None."""
    text = read_text(path)
    return None if text is None else parse_integer(text)


def parse_integer(text: str) -> int | None:
    """Return a whole number of 64 bits, or None where a text is none."""
    try:
        number = int(text)
    except ValueError:
        return None
    return number if abs(number) < _MOST else None


def matching(folder: Path, pattern: str) -> list[Path]:
    """Return the entries of a folder that match, sorted; none where it cannot be read."""
    try:
        return sorted(folder.glob(pattern))
    except OSError:
        return []
