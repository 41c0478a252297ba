"""Open a checkpoint to be read one decoder layer at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from edgemoe.errors import StreamingError
from edgemoe.models.checkpoint import Checkpoint
from edgemoe.models.loading import quiet_transformers, refusing_misfits, stored_dtype
from edgemoe.models.memory_budget import default_limit
from edgemoe.models.streaming import Skeleton
from edgemoe.models.weights.ties import untie_what_differs

if TYPE_CHECKING:
    from pathlib import Path

    from edgemoe.models.contract import MoeModel

_BYTES_PER_PARAMETER = 4  # float32


@dataclass(frozen=True)
class StreamedModel:
    """A checkpoint that is open layer by layer.

    Attributes:
        moe: The kit's view of the model; a layer's tensors have contents while it is held.
        skeleton: Holds the layers.
    """

    moe: MoeModel
    skeleton: Skeleton


def open_streamed(
    path: Path | Checkpoint, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> StreamedModel:
    """Open a checkpoint; only headers are read.

    Args:
        path: The checkpoint, plain or ragged.
        dtype: Floating type to hold weights in.
        device: Where to hold them while they are held.

    Returns:
        The model, in eval mode, without gradients, on the meta device.

    Raises:
        FamilyError: The family is not supported.
        CheckpointError: The checkpoint is missing, a pickle, truncated or inconsistent.
        StreamingError: The family's layers cannot be loaded one by one.
    """
    checkpoint = Checkpoint.open(path)
    _, config, _, files = (
        checkpoint.family,
        checkpoint.config,
        checkpoint.note,
        checkpoint.weights,
    )
    model_class = checkpoint.model_class
    with refusing_misfits(checkpoint.path), quiet_transformers():
        skeleton = Skeleton(model_class, config, files, dtype, device, checkpoint.wrapper)
    checkpoint.check_left_out(skeleton)
    untie_what_differs(skeleton.model, skeleton.conversion)
    stored = stored_dtype(config) or skeleton.stored_dtype
    return StreamedModel(checkpoint.adapt(skeleton.model, stored), skeleton)


def open_larger(
    path: Path | Checkpoint, limit_bytes: int | None = None
) -> StreamedModel | None:
    """Open a checkpoint to be streamed, if it is too large to be loaded.

    Args:
        path: The checkpoint.
        limit_bytes: Size of the largest model that is loaded whole, in float32; half of the
            memory that this process may use without.

    Returns:
        The checkpoint; None where it is to be loaded.

    Raises:
        CheckpointError: The checkpoint is missing, unsafe or inconsistent.
        FamilyError: The family is not supported.
    """
    try:
        streamed = open_streamed(path)
    except StreamingError:
        # Its layers cannot be told apart: it has to fit.
        return None
    limit_bytes = default_limit() if limit_bytes is None else limit_bytes
    parameters = sum(parameter.numel() for parameter in streamed.moe.model.parameters())
    return streamed if parameters * _BYTES_PER_PARAMETER > limit_bytes else None
