"""Open the checkpoint of an export: in memory, or layer by layer where it is larger."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgemoe.models.checkpoint import load_model
from edgemoe_exporters.sources.in_memory import SourceInMemory
from edgemoe_exporters.sources.streamed import StreamedSource

if TYPE_CHECKING:
    from pathlib import Path

    from edgemoe.models.fingerprint import FileHashes
    from edgemoe.models.opening import StreamedModel
    from edgemoe.resume import WorkDirectory
    from edgemoe_exporters.sources.protocol import ModelSource


def open_source(
    path: Path, larger: StreamedModel | None, work: WorkDirectory | None, hashes: FileHashes
) -> ModelSource:
    """Open a checkpoint.

    Args:
        path: The checkpoint.
        larger: The same, opened layer by layer because it is larger than memory, or None.
        work: Where a streamed export keeps what is finished.
        hashes: Of the checkpoint's files.

    Returns:
        What an export reads.
    """
    if larger is None:
        return SourceInMemory(load_model(path))
    assert work is not None
    return StreamedSource(larger, path, work, hashes)
