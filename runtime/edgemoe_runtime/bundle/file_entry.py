"""The files of a bundle: digest and size of each, and bytes on disk in all."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgemoe_runtime.json_fields import Json, Value


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """Digest and size in bytes of one file."""

    sha256: str
    size: int

    @classmethod
    def read(cls, value: Value) -> FileEntry:
        """Read from JSON."""
        fields = value.fields("sha256", "size")
        return cls(sha256=fields["sha256"].sha256(), size=fields["size"].integer(0))

    def to_json(self) -> dict[str, Json]:
        """Return the JSON object."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class SizeReport:
    """Bytes on disk: of all files listed, of shared weights, and of each task's own."""

    total_bytes: int
    shared_bytes: int
    task_bytes: Mapping[str, int]

    @classmethod
    def read(cls, value: Value) -> SizeReport:
        """Read from JSON."""
        fields = value.fields("total_bytes", "shared_bytes", "task_bytes")
        return cls(
            total_bytes=fields["total_bytes"].integer(0),
            shared_bytes=fields["shared_bytes"].integer(0),
            task_bytes={
                name: item.integer(0) for name, item in fields["task_bytes"].mapping().items()
            },
        )

    def to_json(self) -> dict[str, Json]:
        """Return the JSON object."""
        return {
            "total_bytes": self.total_bytes,
            "shared_bytes": self.shared_bytes,
            "task_bytes": dict(self.task_bytes),
        }
