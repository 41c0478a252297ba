"""What is said once about a checkpoint that is read: what of it has no effect, and why."""

from __future__ import annotations

import logging
import multiprocessing
from typing import TYPE_CHECKING

from edgemoe.models.weights.name_words import COMPUTED

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from edgemoe.models.weights.left_out import LeftOut

_LOG = logging.getLogger(__name__)
_MOST_ENTRIES = 5

_said: set[tuple[str, str]] = set()


def remarks(dropped: Sequence[str], left_out: Sequence[LeftOut]) -> list[str]:
    """Say what of a checkpoint has no effect.

    Args:
        dropped: Entries of config.json that are not obeyed because they choose code.
        left_out: What its weights hold besides the language model.

    Returns:
        Sentences; none where there is nothing to say.
    """
    found = []
    if dropped:
        more = len(dropped) - _MOST_ENTRIES
        shown = ", ".join(dropped[:_MOST_ENTRIES]) + (f" and {more} more" if more > 0 else "")
        found.append(
            "config.json may not choose the code that runs, so these entries are dropped: "
            f"{shown}"
        )
    # What every model computes for itself is no loss.
    parts = [
        f"{part.what} ({part.tensors} tensors, {part.nbytes / 1e6:.1f} MB, "
        f"such as {part.example})"
        for part in left_out
        if part.what != COMPUTED
    ]
    if parts:
        found.append(f"only the language model is read, left out are {'; '.join(parts)}")
    return found


def remark_once(path: Path, remark: str) -> None:
    """Log a remark about a checkpoint, unless this process or the one that started it did.

    Args:
        path: The checkpoint.
        remark: What to say of it.
    """
    key = (str(path), remark)
    if key not in _said and multiprocessing.parent_process() is None:
        _said.add(key)
        _LOG.info("%s: %s.", path, remark)
