"""Which checkpoint statistics and plans belong to: a hash of what defines its outputs."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch

from edgemoe.models.safety import check_weights

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_CHUNK_BYTES = 1 << 22
_DEFINING = ("config.json", "edgemoe.json")


def fingerprint_checkpoint(path: Path) -> str:
    """Hash the configuration and the weights of a checkpoint.

    Args:
        path: Checkpoint directory.

    Returns:
        SHA-256, in hexadecimal, of the names and the SHA-256 of the files that a model is
        loaded from, ordered by name. Other files beside them do not count.

    Raises:
        CheckpointError: Weights are missing, or are not safetensors.
    """
    settings = [path / name for name in _DEFINING if (path / name).exists()]
    files = sorted([*settings, *check_weights(path)])
    whole = hashlib.sha256()
    for file in files:
        whole.update(f"{file.name}\0{hash_file(file)}\n".encode())
    return whole.hexdigest()


def fingerprint_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """Hash tensors by name, type, shape and bytes.

    Args:
        tensors: For example a state dict.

    Returns:
        SHA-256 in hexadecimal.
    """
    whole = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        whole.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\n".encode())
        # NumPy has no bfloat16; bytes have no type.
        whole.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def hash_file(path: Path) -> str:
    """Hash one file.

    Args:
        path: The file.

    Returns:
        SHA-256 in hexadecimal.
    """
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
