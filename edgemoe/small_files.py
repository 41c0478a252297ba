"""Small files of checkpoints: opened once by a process, as long as they stay what they were.

What a command refuses before torch is imported looks at config.json too, and so does whatever
opens the checkpoint afterwards.
"""

from __future__ import annotations

import functools
import time
from pathlib import Path

from edgemoe_runtime.input_files import read_file

_SETTLED_NS = 100_000_000  # clocks of file systems tick every few milliseconds


def read_once(path: Path) -> bytes:
    """Read a file, unless this process did and it is the same still.

    Args:
        path: A regular file of some kilobytes.

    Returns:
        Its content.

    Raises:
        OSError: It cannot be read, or is no regular file.
    """
    found = path.stat()
    if time.time_ns() - found.st_mtime_ns < _SETTLED_NS:
        # Changed just now: it could change again without its time telling.
        return read_file(path)
    stamp = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    return _read(str(path), stamp)


@functools.lru_cache(maxsize=16)
def _read(path: str, stamp: tuple[int, ...]) -> bytes:
    del stamp
    return read_file(Path(path))
