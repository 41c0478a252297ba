"""The tensors of weight files, whatever format these have."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgemoe.models.gguf.reading import open_gguf
from edgemoe.models.quantised.reading import QuantisedWeights, announces_form, read_quantised
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
        CheckpointError: A tensor has a type that torch does not compute with, or no place, or a
            quantised weight lacks a part.
    """
    model = open_gguf(files[0]) if files else None
    if model is not None:
        return dict(model.tensors)
    found = find_quantised(files)
    return read_stored_tensors(files) if found is None else found.tensors


def find_quantised(files: Sequence[Path]) -> QuantisedWeights | None:
    """Open the weights of a safetensors checkpoint where they are quantised.

    Args:
        files: Its whole files.

    Returns:
        Its tensors by their names in a plain checkpoint; None where nothing announces a form
        that edgemoe reads.

    Raises:
        CheckpointError: As `list_tensors`, or config.json announces another form.
    """
    if not files or not announces_form(files[0].parent):
        return None
    return read_quantised(read_stored_tensors(files), files[0].parent)
