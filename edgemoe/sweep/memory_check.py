"""Whether there is room for the model in every worker."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgemoe.errors import SpreadError, StreamingError
from edgemoe.models.memory_budget import default_limit
from edgemoe.models.opening import open_streamed
from edgemoe.models.safety import check_weights

if TYPE_CHECKING:
    from pathlib import Path

_BYTES_PER_PARAMETER = 4  # float32


def fits_whole(model: Path, workers: int, limit_bytes: int | None = None) -> bool:
    """Return whether workers load the model whole; refuse more of them than fit in memory.

    Args:
        model: Checkpoint directory.
        workers: Processes of this machine that each hold the model.
        limit_bytes: Size in float32 of what they may hold together; half of the memory that
            this process may use without: what a plan keeps is in memory twice.

    Returns:
        Whether the model is loaded whole; False where it is larger than the limit, and has to
        be read one decoder layer at a time.

    Raises:
        SpreadError: The model fits once, but not once for each worker.
        CheckpointError: The checkpoint is missing, unsafe or inconsistent.
    """
    limit = default_limit() if limit_bytes is None else limit_bytes
    try:
        parameters = open_streamed(model).moe.model.parameters()
        needed = sum(parameter.numel() for parameter in parameters) * _BYTES_PER_PARAMETER
    except StreamingError:
        # Its layers cannot be told apart: it has to fit, and is at least as large as its files.
        needed = min(sum(file.stat().st_size for file in check_weights(model)), limit)
    if needed > limit:
        return False
    if needed * workers > limit:
        raise SpreadError(
            f"every worker must have room for the model, {needed / 1e9:.2f} GB in float32, in "
            f"{limit / 1e9:.2f} GB (half of the memory that is free, or --memory-limit), got "
            f"{workers} workers. Use --workers {limit // needed} or fewer."
        )
    return True
