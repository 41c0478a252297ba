"""Record which weights of a bundle were written, so that an interrupted export can resume.

Where a tensor lies in the spool follows from the lengths and hashes of those before it, and
from nothing else. The journal keeps these, one line of JSON for each tensor in the order of
writing; a resumed export takes them instead of reading, changing and quantising weights
again. A line is written once the bytes that it describes have reached the disk.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from edgemoe.errors import OutputError
from edgemoe_runtime.input_files import parse_strict

if TYPE_CHECKING:
    from pathlib import Path

_SYNC_BYTES = 256 << 20


@dataclass(frozen=True)
class Contents:
    """Length and hashes of a tensor's bytes.

    Attributes:
        length: Their number.
        digests: SHA-256 of each of their equal parts, one part where the tensor is no stack.
    """

    length: int
    digests: tuple[bytes, ...]

    @classmethod
    def of(cls, data: memoryview, parts: int = 1) -> Contents:
        """Hash a tensor's bytes.

        Args:
            data: uint8 `[length]`.
            parts: Their number; divides the length.

        Returns:
            Length and hashes.
        """
        size = len(data) // parts
        return cls(
            len(data),
            tuple(
                hashlib.sha256(data[part * size : (part + 1) * size]).digest()
                for part in range(parts)
            ),
        )

    @property
    def key(self) -> tuple[int, bytes]:
        """Length and one hash: equal for equal bytes only."""
        if len(self.digests) == 1:
            return self.length, self.digests[0]
        return self.length, hashlib.sha256(b"".join(self.digests)).digest()


class WeightJournal:
    """The tensors that were written, in their order.

    Args:
        path: The file; None keeps nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._earlier: list[tuple[str, str, Contents]] = []
        self._position = 0
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0
        if path is not None and path.exists():
            self._read(path)

    @property
    def is_kept(self) -> bool:
        """Whether the export can be resumed."""
        return self._path is not None

    @property
    def has_earlier(self) -> bool:
        """Whether an earlier process wrote tensors."""
        return bool(self._earlier)

    def recall(self, task: str, name: str) -> Contents | None:
        """Return what an earlier process wrote next.

        Args:
            task: Whose tensor is to be written.
            name: Its name.

        Returns:
            Its contents; None where it has not been written.

        Raises:
            OutputError: Another tensor was.
        """
        if self._position == len(self._earlier):
            return None
        known_task, known_name, contents = self._earlier[self._position]
        if (known_task, known_name) != (task, name):
            raise OutputError(
                f"unfinished weights must be those of this export, got {known_task}: "
                f"{known_name} for {task}: {name} in {self._path}. Pass --force to begin anew."
            )
        self._position += 1
        return contents

    def note(self, task: str, name: str, contents: Contents, spool: BinaryIO) -> None:
        """Record a tensor that was written.

        Args:
            task: Whose tensor it is.
            name: Its name.
            contents: Its bytes.
            spool: Where they were written.
        """
        if self._path is None:
            return
        digests = [digest.hex() for digest in contents.digests]
        line = {"task": task, "name": name, "length": contents.length, "digests": digests}
        self._waiting.append(json.dumps(line).encode() + b"\n")
        self._waiting_bytes += contents.length
        if self._waiting_bytes >= _SYNC_BYTES:
            self.sync(spool)

    def sync(self, spool: BinaryIO) -> None:
        """Flush what was recorded to the disk.

        Args:
            spool: Where the tensors were written.
        """
        if self._path is None or not self._waiting:
            return
        spool.flush()
        os.fsync(spool.fileno())
        with self._path.open("ab") as file:
            file.writelines(self._waiting)
            file.flush()
            os.fsync(file.fileno())
        self._waiting = []
        self._waiting_bytes = 0

    def _read(self, path: Path) -> None:
        whole = 0
        with path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):  # the last one, cut short
                    break
                found = parse_strict(line)
                digests = tuple(bytes.fromhex(digest) for digest in found["digests"])
                contents = Contents(found["length"], digests)
                self._earlier.append((found["task"], found["name"], contents))
                whole += len(line)
        os.truncate(path, whole)
