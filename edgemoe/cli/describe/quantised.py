"""How `inspect` tells a quantised checkpoint: as it is stored, and as it is read. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgemoe.models.quantised.announcement import find_unused, held_type, understand
from edgemoe.models.quantised.form import UnreadableFormError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgemoe.models.quantised.notes import QuantisationNote

    Tensors = dict[str, tuple[str, list[int]]]


def plain_tensors(
    tensors: Tensors, note: QuantisationNote | None, config: Mapping[str, Any]
) -> tuple[Tensors, dict[str, Any]]:
    """Tell what a quantised checkpoint's tensors are once they are read.

    Args:
        tensors: Type and shape of each stored tensor.
        note: What announces that weights are quantised.
        config: The JSON object of config.json.

    Returns:
        The tensors of the plain checkpoint, and what to say of it: nothing where no weight is
        quantised, or in a form that edgemoe does not read.
    """
    if note is None:
        return tensors, {}
    said = {"quantised_by": str(note)}
    try:
        form = understand(note)
        pieces = list(form.find(tensors))
    except UnreadableFormError as error:
        return tensors, {**said, "stored": f"not read: {error}"}
    if not pieces:
        return tensors, said
    held = held_type(config)
    used = {name for piece in pieces for name in piece.parts.values()}
    used.update(find_unused(tensors, [piece.target for piece in pieces]))
    plain = {name: entry for name, entry in tensors.items() if name not in used}
    plain |= {piece.target: (held, list(piece.shape)) for piece in pieces}
    return plain, {**said, "stored": f"{len(pieces)} weights in {form.says}, read as {held}"}
