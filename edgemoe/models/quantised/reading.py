"""Open a quantised checkpoint: its tensors under the names of a plain one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from edgemoe.errors import CheckpointError
from edgemoe.models.quantised.announcement import find_unused, held_type, understand
from edgemoe.models.quantised.form import UnreadableFormError
from edgemoe.models.quantised.notes import (
    find_quantisation_note,
    quantised_message,
    reader_beside,
    without_notes,
)
from edgemoe.models.quantised.tensors import QuantisedTensor
from edgemoe.models.stored_tensors import DTYPE_NAMES
from edgemoe.small_files import read_once
from edgemoe_runtime.input_files import parse_strict

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path
    from typing import Any

    from edgemoe.models.quantised.form import Form, Piece
    from edgemoe.models.quantised.notes import QuantisationNote
    from edgemoe.models.stored_tensors import StoredTensor

_CONFIG = "config.json"


@dataclass(frozen=True, kw_only=True)
class QuantisedWeights:
    """The tensors of a checkpoint that announces quantised weights.

    Attributes:
        form: How the quantised ones are stored.
        dtype: Type that they are read in.
        tensors: Those of a plain checkpoint, by name, and what is left over.
        count: How many are made of quantised ones.
        unused: Names of scales of activations, which have no effect.
        place: What announces the form.
    """

    form: Form
    dtype: torch.dtype
    tensors: dict[str, StoredTensor]
    count: int
    unused: tuple[str, ...]
    place: str

    @property
    def remark(self) -> str:
        """What is said once of such a checkpoint."""
        said = (
            f"{self.count} weights stored in {self.form.says} are read as "
            f"{str(self.dtype).removeprefix('torch.')}; a checkpoint made of it holds plain "
            f"weights, without {self.place}"
        )
        if self.unused:
            said += (
                f"; scales of activations have no effect here ({len(self.unused)} tensors, "
                f"such as {self.unused[0]})"
            )
        return said


def find_form(path: Path, note: QuantisationNote | None) -> Form | None:
    """Tell how a checkpoint's weights are stored.

    Args:
        path: The checkpoint, for messages.
        note: What it announces.

    Returns:
        The form; None where none is announced, or by a file that may be a remnant and that is
        not understood: weights that are quantised are then refused by their types.

    Raises:
        CheckpointError: config.json announces a form that edgemoe does not read.
    """
    try:
        return None if note is None else understand(note)
    except UnreadableFormError as error:
        if note is not None and not note.is_in_config:
            return None
        raise CheckpointError(quantised_message(path, str(error))) from error


def plain_settings(
    path: Path, content: Mapping[str, Any], note: QuantisationNote | None
) -> dict[str, Any]:
    """Return what config.json says of the model that it is once its weights are dequantised.

    Args:
        path: The checkpoint, for messages.
        content: The JSON object of config.json.
        note: What announces quantised weights.

    Returns:
        The settings without that.

    Raises:
        CheckpointError: config.json announces a form that edgemoe does not read.
    """
    find_form(path, note)
    return without_notes(content)


def read_quantised(stored: Mapping[str, StoredTensor], path: Path) -> QuantisedWeights | None:
    """Give a checkpoint's quantised weights their names and shapes in a plain one.

    Args:
        stored: All its stored tensors.
        path: The checkpoint.

    Returns:
        Its tensors; None where nothing announces a form that edgemoe reads, or a file does
        that may be a remnant and no weight is stored so.

    Raises:
        CheckpointError: A part is missing or has another type or shape, or config.json
            announces a form that edgemoe does not read or that no weight has.
    """
    content = _read_settings(path)
    note, form = _read_note(path, content)
    if note is None or form is None:
        return None
    headers = {n: (DTYPE_NAMES[t.dtype], list(t.shape)) for n, t in stored.items()}
    dtype: torch.dtype = getattr(torch, held_type(content))
    try:
        made = _make(stored, form.find(headers), dtype)
    except UnreadableFormError as error:
        raise CheckpointError(quantised_message(path, f"{error}, as {form.says}")) from error
    if not made and note.is_in_config:
        raise CheckpointError(quantised_message(path, f"{note}, and no weight stored so"))
    if not made:
        return None
    unused = tuple(find_unused(headers, made))
    used = {part.name for tensor in made.values() for part in tensor.parts.values()}
    left = {n: t for n, t in stored.items() if n not in used and n not in unused}
    return QuantisedWeights(
        form=form,
        dtype=dtype,
        tensors={**left, **made},
        count=len(made),
        unused=unused,
        place=note.place,
    )


def _make(
    stored: Mapping[str, StoredTensor], pieces: Iterable[Piece], dtype: torch.dtype
) -> dict[str, QuantisedTensor]:
    made: dict[str, QuantisedTensor] = {}
    for piece in pieces:
        if piece.target in made or (
            piece.target in stored and piece.target not in piece.parts.values()
        ):
            raise UnreadableFormError(f"{piece.target} twice, plain and quantised")
        first = stored[next(iter(piece.parts.values()))]
        made[piece.target] = QuantisedTensor(
            name=piece.target,
            file=first.file,
            dtype=dtype,
            shape=piece.shape,
            begin=first.begin,
            piece=piece,
            parts={role: stored[name] for role, name in piece.parts.items()},
        )
    return made


def announces_form(path: Path) -> bool:
    """Tell whether a checkpoint announces quantised weights in a form that edgemoe reads.

    Args:
        path: The checkpoint.

    Returns:
        Whether it does.

    Raises:
        CheckpointError: config.json announces another form.
    """
    return _read_note(path, _read_settings(path))[1] is not None


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        found = parse_strict(read_once(path / _CONFIG), infinities=True)
    except (ValueError, OSError):
        return {}  # whoever needs the settings refuses them by name
    return found if isinstance(found, dict) else {}


def _read_note(
    path: Path, content: Mapping[str, Any]
) -> tuple[QuantisationNote | None, Form | None]:
    note = find_quantisation_note(content, reader_beside(path))
    return note, find_form(path, note)
