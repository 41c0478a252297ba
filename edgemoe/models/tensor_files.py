"""The tensors of weight files, whatever format these have."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgemoe.models.gguf.reading import open_gguf
from edgemoe.models.stored_tensors import read_stored_tensors

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from edgemoe.models.stored_tensors import StoredTensor


def list_tensors(files: Sequence[Path]) -> dict[str, StoredTensor]:
    """List the tensors of a checkpoint by their names in a Hugging Face checkpoint.

    Args:
        files: Whole files, as `edgemoe.models.safety.check_weights` returns them.

    Returns:
        The tensors by name; only headers are read.

    Raises:
        CheckpointError: A tensor has a type that torch does not compute with, or no place.
    """
    model = open_gguf(files[0]) if files else None
    return read_stored_tensors(files) if model is None else dict(model.tensors)
