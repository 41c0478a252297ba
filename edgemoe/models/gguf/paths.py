"""Which files a GGUF checkpoint is made of."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from edgemoe.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

SUFFIX = ".gguf"
_SPLIT = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_MOST_PARTS = 10_000


def find_gguf(path: Path) -> list[Path] | None:
    """Return the GGUF files that a path names.

    Args:
        path: A `.gguf` file, any file of a split one, or a folder that holds one GGUF model and
            no config.json.

    Returns:
        The files, in order; None where the path is no GGUF checkpoint.

    Raises:
        CheckpointError: A part of a split file is missing, or a folder holds several models.
    """
    if path.is_file():
        return _parts(path) if path.suffix == SUFFIX else None
    if not path.is_dir() or (path / "config.json").exists():
        return None
    # A projector of images is no language model; llama.cpp keeps it beside the model.
    files = sorted(file for file in path.glob(f"*{SUFFIX}") if "mmproj" not in file.name)
    if not files:
        return None
    parts = _parts(files[0])
    others = [file.name for file in files if file not in parts]
    if others:
        raise CheckpointError(
            f"a folder must hold one GGUF model, got {files[0].name} and {others[0]} in "
            f"{path}. Name the file itself."
        )
    return parts


def _parts(file: Path) -> list[Path]:
    match = _SPLIT.fullmatch(file.name)
    if match is None:
        return [file]
    count = int(match["count"])
    if not 1 <= count <= _MOST_PARTS:
        raise CheckpointError(
            f"a split GGUF must have 1 to {_MOST_PARTS} parts, got {count} in the name of "
            f"{file}. Rename the file."
        )
    parts = [
        file.with_name(f"{match['stem']}-{number:05}-of-{count:05}{SUFFIX}")
        for number in range(1, count + 1)
    ]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise CheckpointError(
            f"a split GGUF must be whole, got no {missing[0]} beside {file}. Copy all {count} "
            "parts into one folder."
        )
    return parts
