"""Lines of task files, told apart by what they say.

Who prunes, merges or trains on a line may not be judged on it. So whatever was made from lines
carries their digests, 8 bytes each, and a score looks for its own lines among them. A digest
is of the text that calibration reads, whatever file it is in.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection

    from edgemoe.tasks import TaskRecord


def digest_line(record: TaskRecord) -> int:
    """Name a line by its content.

    Args:
        record: The line.

    Returns:
        The first 8 bytes of the SHA-256 of what calibration reads of it, as a signed integer.
    """
    found = hashlib.sha256(record.calibration_text.encode()).digest()
    return int.from_bytes(found[:8], "big", signed=True)


def write_digests(digests: Collection[int]) -> str:
    """Write digests as text.

    Args:
        digests: As `digest_line` returns.

    Returns:
        Base64 of the sorted digests; equal sets give equal text.
    """
    ordered = sorted(set(digests))
    return base64.b64encode(struct.pack(f">{len(ordered)}q", *ordered)).decode()


def read_digests(text: str) -> frozenset[int]:
    """Read what `write_digests` wrote.

    Args:
        text: Base64.

    Returns:
        The digests.

    Raises:
        ValueError: The text is something else.
    """
    try:
        content = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(f"digests of lines must be base64, got: {error}") from error
    if len(content) % 8:
        raise ValueError(f"digests of lines must have 8 bytes each, got {len(content)} bytes")
    return frozenset(struct.unpack(f">{len(content) // 8}q", content))
