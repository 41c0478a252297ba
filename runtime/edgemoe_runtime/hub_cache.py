"""Links as caches of model hubs make them: snapshots/REVISION/FILE to blobs/HASH beside it.

Such a cache has one folder for each repository, and every file of a snapshot is a link into the
repository's folder `blobs`. A link that stays there is as good as the file: nobody but the
cache's owner can put something into that folder. Any other link is refused by who asks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_SNAPSHOTS, _BLOBS = "snapshots", "blobs"


def resolve_blob(root: Path, path: Path) -> Path | None:
    """Return the file behind a link of a snapshot.

    Args:
        root: directory of the snapshot, which holds a bundle or a checkpoint.
        path: the link in it.

    Returns:
        The regular file in the repository's `blobs`; None where the link leads elsewhere, or
        the directory is no snapshot of a cache.
    """
    folder = root.resolve()
    blobs = folder.parent.parent / _BLOBS
    if folder.parent.name != _SNAPSHOTS or blobs.is_symlink() or not blobs.is_dir():
        return None
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError):  # broken, or a circle
        return None
    return target if target.parent == blobs and target.is_file() else None


def stays_in_cache(root: Path) -> bool:
    """Return whether a directory is a snapshot in a cache of links.

    Args:
        root: the directory.
    """
    folder = root.resolve()
    return folder.parent.name == _SNAPSHOTS and (folder.parent.parent / _BLOBS).is_dir()
