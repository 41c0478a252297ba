"""How many tokens a session of `run` and `bench` can hold, where nobody said it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from edgemoe_runtime.bundle.manifest import Manifest

MAX_LENGTH: dict[str, Any] = {
    "metavar": "N",
    "help": "Tokens of prompt and answer together at most.  [default: what the model takes and "
    "memory holds, 4096 where that is enough]",
}
_SHARE = 0.5  # of the free memory: weights and scratch need the rest


def choose_length(bundle: Path, needed: int, root: Path = Path("/")) -> int | None:
    """Choose the length of a session.

    Args:
        bundle: The bundle.
        needed: Tokens of prompt and answer, at most.
        root: Root of the file system that the free memory is read from.

    Returns:
        Tokens; None where the session's own choice is enough, or no manifest can be read.
    """
    from edgemoe_runtime.bundle.manifest_file import load_manifest
    from edgemoe_runtime.device.sensors import read_sensors
    from edgemoe_runtime.opening import DEFAULT_MAX_LENGTH

    if needed <= DEFAULT_MAX_LENGTH:
        return None
    manifest = load_manifest(bundle)
    free = read_sensors(root).memory_available_bytes
    fitting = (
        needed if free is None else int(free * _SHARE) // max(bytes_per_token(manifest), 1)
    )
    longest = min(manifest.model.max_position_embeddings, needed, fitting)
    return longest if longest > DEFAULT_MAX_LENGTH else None


def bytes_per_token(manifest: Manifest) -> int:
    """Return what one token takes in the key-value cache.

    Args:
        manifest: That of the bundle.
    """
    numbers = sum(
        layer.heads * (layer.key_dim + layer.value_dim)
        for layer in manifest.kv_cache.layers
        if layer is not None
    )
    return numbers * np.dtype(manifest.kv_cache.dtype).itemsize
