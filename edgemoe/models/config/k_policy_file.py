"""`k_policy.json`: the k policy that a checkpoint carries beside its weights. No torch."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from edgemoe.errors import CheckpointError
from edgemoe.k_policy import KPolicy
from edgemoe.models.safety import read_json_object
from edgemoe_runtime.messages import quote

if TYPE_CHECKING:
    from pathlib import Path

FILE_NAME = "k_policy.json"
_FORMAT = "edgemoe.k_policy"
_VERSION = 1


def save_k_policy(policy: KPolicy | None, path: Path) -> None:
    """Write a policy beside a checkpoint's weights.

    Args:
        policy: The policy; None writes nothing.
        path: Checkpoint directory.
    """
    if policy is not None:
        content = {"format": _FORMAT, "version": _VERSION, **policy.to_json()}
        text = json.dumps(content, indent=1) + "\n"
        (path / FILE_NAME).write_text(text, encoding="utf-8")


def read_k_policy(path: Path, content: bytes | None = None) -> KPolicy | None:
    """Read the policy of a checkpoint.

    Args:
        path: Checkpoint directory.
        content: What the file holds, where that was read already.

    Returns:
        The policy; None where there is none.

    Raises:
        CheckpointError: The file breaks the format.
    """
    file = path / FILE_NAME
    if content is None and not file.exists():
        return None
    found = read_json_object(file, content)
    form, version = found.pop("format", None), found.pop("version", None)
    if (form, version) != (_FORMAT, _VERSION):
        raise CheckpointError(
            f"{file} must be {_FORMAT} version {_VERSION}, got {quote(form, 80)} version "
            f"{quote(version, 80)}. Open it with the edgemoe that wrote it."
        )
    return KPolicy.from_json(found, str(file))
