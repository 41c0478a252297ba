"""`edgemoe.json`: what a checkpoint says of layers beyond config.json. No torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgemoe.errors import CheckpointError
from edgemoe.models.safety import read_json_object
from edgemoe.models.shapes import Ranks
from edgemoe_runtime.messages import quote

if TYPE_CHECKING:
    from pathlib import Path

FILE_NAME = "edgemoe.json"
_FORMAT = "edgemoe.checkpoint"
_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class RaggedNote:
    """Content of `edgemoe.json`.

    Attributes:
        moe_layers: Indices of the decoder layers with experts.
        experts_per_layer: Experts of each of them.
        provenance: How the checkpoint was made.
        ranks_per_layer: Ranks of each of them; None for a layer that is not factored.
        basis_per_layer: Rank of the bases that the experts of each share; None for a layer
            without.
        widths_per_layer: Intermediate channels of the experts of each; None where they have
            those that config.json says.
    """

    moe_layers: tuple[int, ...]
    experts_per_layer: tuple[int, ...]
    provenance: dict[str, Any]
    ranks_per_layer: tuple[Ranks | None, ...] | None = None
    basis_per_layer: tuple[int | None, ...] | None = None
    widths_per_layer: tuple[int, ...] | None = None

    def save(self, path: Path) -> None:
        """Write the note.

        Args:
            path: Checkpoint directory.
        """
        content = {
            "format": _FORMAT,
            "version": _VERSION,
            "moe_layers": list(self.moe_layers),
            "experts_per_layer": list(self.experts_per_layer),
            "plan_sha256": self.provenance.get("plan_sha256"),
            "provenance": self.provenance,
        }
        if self.ranks_per_layer is not None:
            content["ranks_per_layer"] = [
                None if ranks is None else [ranks.up, ranks.down]
                for ranks in self.ranks_per_layer
            ]
        if self.basis_per_layer is not None:
            content["basis_per_layer"] = list(self.basis_per_layer)
        if self.widths_per_layer is not None:
            content["widths_per_layer"] = list(self.widths_per_layer)
        text = json.dumps(content, indent=2) + "\n"
        (path / FILE_NAME).write_text(text, encoding="utf-8")


def read_ragged_note(path: Path, content: bytes | None = None) -> RaggedNote | None:
    """Read `edgemoe.json`, where a checkpoint has one.

    Args:
        path: Checkpoint directory.
        content: What the file holds, where that was read already.

    Returns:
        What it says; None for a plain checkpoint.

    Raises:
        CheckpointError: The file breaks the format.
    """
    file = path / FILE_NAME
    if content is None and not file.exists():
        return None
    note = _parse(file, read_json_object(file, content))
    pairs = zip(note.ranks_per_layer or (), note.basis_per_layer or (), strict=False)
    both = [index for index, pair in enumerate(pairs) if None not in pair]
    if both:
        raise CheckpointError(
            f"{file}: a layer must be factored or share bases, got both for MoE layer "
            f"{both[0]}. Apply the plan again."
        )
    return note


def _parse(file: Path, content: dict[str, Any]) -> RaggedNote:
    if content.get("format") != _FORMAT or content.get("version") != _VERSION:
        raise CheckpointError(
            f"{file} must be {_FORMAT} version {_VERSION}, got "
            f"{quote(content.get('format'), 80)} version {quote(content.get('version'), 80)}. "
            "Open it with the edgemoe that wrote it."
        )
    unknown = set(content) - {
        "format", "version", "moe_layers", "experts_per_layer", "plan_sha256", "provenance",
        "ranks_per_layer", "basis_per_layer", "widths_per_layer",
    }  # fmt: skip
    if unknown:
        raise CheckpointError(
            f"{file} must have no other keys, got {quote(sorted(unknown))}. Remove them."
        )
    provenance = content.get("provenance")
    return RaggedNote(
        moe_layers=_counts(file, content, "moe_layers", least=0),
        experts_per_layer=_counts(file, content, "experts_per_layer", least=1),
        provenance=provenance if isinstance(provenance, dict) else {},
        ranks_per_layer=_ranks(file, content),
        basis_per_layer=_bases(file, content),
        widths_per_layer=_widths(file, content),
    )


def _ranks(file: Path, content: dict[str, Any]) -> tuple[Ranks | None, ...] | None:
    found = content.get("ranks_per_layer")
    if found is None:
        return None
    counts = content["experts_per_layer"]
    if not isinstance(found, list) or len(found) != len(counts):
        raise CheckpointError(
            f"{file}: ranks_per_layer must have an entry for each of the {len(counts)} MoE "
            f"layers, got {found!r:.80}. Apply the plan again."
        )
    ranks = []
    for entry in found:
        is_pair = (
            isinstance(entry, list)
            and len(entry) == 2
            and all(type(rank) is int and rank > 0 for rank in entry)
        )
        if entry is not None and not is_pair:
            raise CheckpointError(
                f"{file}: ranks_per_layer must hold pairs of integers in [1, inf), or null, "
                f"got {entry!r:.80}. Apply the plan again."
            )
        ranks.append(None if entry is None else Ranks(*entry))
    return tuple(ranks)


def _bases(file: Path, content: dict[str, Any]) -> tuple[int | None, ...] | None:
    found = content.get("basis_per_layer")
    if found is None:
        return None
    layers = len(content["experts_per_layer"])
    is_list = isinstance(found, list) and len(found) == layers
    if not is_list or any(
        rank is not None and (type(rank) is not int or rank < 1) for rank in found
    ):
        raise CheckpointError(
            f"{file}: basis_per_layer must have an integer in [1, inf), or null, for each of "
            f"the {layers} MoE layers, got {found!r:.80}. Apply the plan again."
        )
    return tuple(found)


def _widths(file: Path, content: dict[str, Any]) -> tuple[int, ...] | None:
    if content.get("widths_per_layer") is None:
        return None
    found = _counts(file, content, "widths_per_layer", least=1)
    layers = len(content["experts_per_layer"])
    if len(found) != layers:
        raise CheckpointError(
            f"{file}: widths_per_layer must have an integer for each of the {layers} MoE "
            f"layers, got {len(found)}. Apply the plan again."
        )
    return found


def _counts(file: Path, content: dict[str, Any], key: str, *, least: int) -> tuple[int, ...]:
    found = content.get(key)
    if not isinstance(found, list) or any(
        isinstance(value, bool) or not isinstance(value, int) or value < least
        for value in found
    ):
        raise CheckpointError(
            f"{file}: {key} must be a list of integers in [{least}, inf), got "
            f"{quote(found)}. Apply the plan again."
        )
    return tuple(found)
