"""How much a training takes, so that one that cannot fit is refused before it begins."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from edgemoe.errors import RecoveryError
from edgemoe.evaluate.batches import BATCH_TOKENS
from edgemoe.models.memory_budget import available_memory
from edgemoe.models.safety import check_weights
from edgemoe.models.weights.tensor_files import list_tensors

if TYPE_CHECKING:
    from pathlib import Path

    from edgemoe.recover.method import Training

_BYTES = 4  # float32
# Of each parameter that trains: its gradient and the two moments of AdamW.
_PER_TRAINED = 3
# On disk: its value and the moments, twice while one replaces the other, and the best value.
_PER_KEPT = 2 * 3 + 2
# Logits of a batch: the student's, their gradient, the teacher's.
_LOGITS = 3


def free_bytes(device: str) -> int:
    """Return how much memory is left where the models are to be.

    Args:
        device: `cpu` or `cuda:N`.

    Returns:
        Bytes.
    """
    if device == "cpu":
        return available_memory()
    return int(torch.cuda.mem_get_info(device)[0])


def weight_bytes(*paths: Path) -> int:
    """Return what checkpoints take in memory, all at once.

    Args:
        paths: Checkpoint directories; only headers are read.

    Returns:
        Bytes, in float32.

    Raises:
        CheckpointError: A checkpoint has no weights, or unsafe or malformed ones.
    """
    return sum(
        math.prod(tensor.shape) * _BYTES
        for path in paths
        for tensor in list_tensors(check_weights(path)).values()
    )


def training_bytes(training: Training, vocabulary_size: int, sequence_length: int) -> int:
    """Return what a training takes besides the weights; activations are not counted.

    Args:
        training: What trains.
        vocabulary_size: Logits of a token.
        sequence_length: Longest sequence in tokens, which is a batch of its own at least.

    Returns:
        Bytes.
    """
    trained = sum(parameter.numel() for parameter in training.parameters.values())
    logits = _LOGITS * max(BATCH_TOKENS, sequence_length) * vocabulary_size
    return (_PER_TRAINED * trained + logits) * _BYTES + training.extra_bytes


def state_bytes(training: Training) -> int:
    """Return what the state of a training takes on disk at most.

    Args:
        training: What trains.

    Returns:
        Bytes.
    """
    trained = sum(parameter.numel() for parameter in training.parameters.values())
    return _PER_KEPT * trained * _BYTES


def require_memory(needed: int, free: int, what: str) -> None:
    """Refuse what does not fit.

    Args:
        needed: Bytes.
        free: Bytes that there are.
        what: What needs them.

    Raises:
        RecoveryError: There are fewer.
    """
    if needed > free:
        raise RecoveryError(
            f"{what} must fit into memory, {needed / 1e9:.1f} GB without activations, got "
            f"{free / 1e9:.1f} GB free. Free some, use a larger machine, or a method that "
            "trains less (router-kd trains the least)."
        )
