"""Open a checkpoint to be read one decoder layer at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from edgemoe.errors import StreamingError
from edgemoe.models.adapter import adapt_model
from edgemoe.models.checkpoint import quiet_transformers, read_config, refusing_misfits
from edgemoe.models.discovery import discover
from edgemoe.models.k_policy import put_k_policy, read_k_policy
from edgemoe.models.memory_budget import default_limit
from edgemoe.models.ragged import make_ragged_class, read_ragged_note
from edgemoe.models.safety import check_weights
from edgemoe.models.streaming import Skeleton

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
    path: Path, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> StreamedModel:
    """Open a checkpoint; only headers are read.

    Args:
        path: Checkpoint directory, plain or ragged.
        dtype: Floating type to hold weights in.
        device: Where to hold them while they are held.

    Returns:
        The model, in eval mode, without gradients, on the meta device.

    Raises:
        FamilyError: The family is not supported.
        CheckpointError: The checkpoint is missing, a pickle, truncated or inconsistent.
        StreamingError: The family's layers cannot be loaded one by one.
    """
    family, config = read_config(path)
    note = read_ragged_note(path)
    files = check_weights(path)
    with refusing_misfits(path):
        facts = discover(family, config)
    base = family.causal_lm
    model_class = base if note is None else make_ragged_class(family, note, facts)
    with refusing_misfits(path), quiet_transformers():
        skeleton = Skeleton(model_class, config, files, dtype, device)
    skeleton.model.__class__ = base
    named = getattr(config, "dtype", None)
    stored_dtype = getattr(torch, named, None) if isinstance(named, str) else named
    if not isinstance(stored_dtype, torch.dtype) or not stored_dtype.is_floating_point:
        stored_dtype = skeleton.stored_dtype
    moe = adapt_model(skeleton.model, path, stored_dtype, facts)
    put_k_policy(moe, read_k_policy(path))
    return StreamedModel(moe, skeleton)


def open_larger(path: Path, limit_bytes: int | None = None) -> StreamedModel | None:
    """Open a checkpoint to be streamed, if it is too large to be loaded.

    Args:
        path: Checkpoint directory.
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
