"""What one forward pass is given."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch


@dataclass(frozen=True)
class Batch:
    """One forward pass.

    Attributes:
        ids: Token ids, int64 `[rows, tokens]`.
        logits_to_keep: Last positions that logits are wanted of; 0 for all.
    """

    ids: torch.Tensor
    logits_to_keep: int = 0

    def inputs(self, device: torch.device | str = "cpu") -> dict[str, Any]:
        """Return the decoder's arguments.

        Args:
            device: Where it computes.
        """
        return {"input_ids": self.ids.to(device), "use_cache": False}


def digest_batches(name: str, batches: Sequence[Batch]) -> str:
    """Hash what tells one pass from another.

    Args:
        name: Of the pass.
        batches: What it runs.

    Returns:
        SHA-256 in hexadecimal.
    """
    digest = hashlib.sha256(f"{name}\n".encode())
    for batch in batches:
        digest.update(f"{tuple(batch.ids.shape)} {batch.logits_to_keep}\n".encode())
        digest.update(batch.ids.contiguous().numpy().data)
    return digest.hexdigest()
