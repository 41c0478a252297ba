"""Refuse to judge a model on lines that it was made from.

Experts are chosen, and weights trained, for the lines that calibration read, so a score of
those lines says how well they were learnt by heart. Plans, checkpoints and bundles carry the
digests of these lines (`edgemoe.data_provenance`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edgemoe.data_provenance import digest_line, read_digests
from edgemoe.errors import TaskFileError
from edgemoe_runtime.bundle.names import MANIFEST_FILE
from edgemoe_runtime.input_files import parse_strict, read_file

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from pathlib import Path

    from edgemoe.tasks import TaskFile

POLICIES = ("refuse", "skip", "warn")
_KEYS = ("calibration_lines", "training_lines")


def examples_seen(
    path: Path, task: str, read: Callable[[str], bytes | None] | None = None
) -> frozenset[int]:
    """Find the lines that a checkpoint or a bundle was made from.

    Args:
        path: A checkpoint directory, or a bundle.
        task: The task; a bundle of several has lines of its own for each.
        read: Reads a file of it by its name, where somebody may have read it already.

    Returns:
        Their digests; none where edgemoe did not make it, or not from lines.
    """
    manifest = _read(path / MANIFEST_FILE, read)
    if manifest:
        tasks = manifest.get("tasks")
        entries = tasks if isinstance(tasks, dict) else {}
        entry = entries.get(task) if len(entries) > 1 else next(iter(entries.values()), None)
        return lines_of(entry.get("plan")) if isinstance(entry, dict) else frozenset()
    note = _read(path / "config.json", read).get("edgemoe")
    return lines_of(note.get("provenance")) if isinstance(note, dict) else frozenset()


def keep_held_out(
    task: TaskFile, lines: Collection[int], policy: str, subject: str
) -> tuple[TaskFile, str | None]:
    """Leave out the lines that a subject was made from, or refuse them.

    Args:
        task: What to judge on.
        lines: Digests of the lines that the subject was made from.
        policy: `refuse` them, `skip` them, or keep them and `warn`.
        subject: What messages call what is judged.

    Returns:
        The task, without the lines that are skipped, and what to warn of.

    Raises:
        TaskFileError: There are such lines and they are refused, or there are no others.
    """
    others = tuple(record for record in task.records if digest_line(record) not in lines)
    read = len(task.records) - len(others)
    if read == 0:
        return task, None
    first = next(record.line for record in task.records if digest_line(record) in lines)
    remark = (
        f"{task.path}: a score must be of lines that {subject} was not made from, got "
        f"{read} of {len(task.records)} lines (the first is line {first}) that calibration "
        "or training read."
    )
    if policy == "warn":
        return task, f"{remark} It says little of other lines."
    if policy == "skip" and others:
        return replace(task, records=others), None
    skip = (
        f" --calibration-lines skip judges the {len(others)} that are left." if others else ""
    )
    raise TaskFileError(f"{remark} Use other lines.{skip}")


def lines_of(provenance: Any) -> frozenset[int]:
    """Gather the digests of the lines behind a provenance and what it builds on.

    Args:
        provenance: As checkpoints and bundles carry it; JSON values.

    Returns:
        The digests; none where it names no lines.
    """
    found: frozenset[int] = frozenset()
    while isinstance(provenance, dict):
        policy = provenance.get("k_policy")
        for part in (provenance, policy.get("provenance") if isinstance(policy, dict) else {}):
            for key in _KEYS:
                text = part.get(key) if isinstance(part, dict) else None
                if isinstance(text, str):
                    found |= read_digests(text)
        provenance = provenance.get("before")
    return found


def _read(path: Path, read: Callable[[str], bytes | None] | None) -> dict[str, Any]:
    # What is broken is refused, with its reason, by those who open it.
    try:
        found = read_file(path) if read is None else read(path.name) or b""
        content = parse_strict(found, infinities=True)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
