"""Which form an announcement means. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgemoe.models.quantised.compressed import compressed
from edgemoe.models.quantised.form import UnreadableFormError
from edgemoe.models.quantised.fp8 import fp8, modelopt
from edgemoe.models.quantised.mxfp4 import mxfp4
from edgemoe.models.quantised.packed_columns import awq, gptq

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from edgemoe.models.quantisation_notes import QuantisationNote
    from edgemoe.models.quantised.form import Form

_METHODS: dict[str, Callable[[Mapping[str, Any], str], Form]] = {
    "awq": awq,
    "compressed-tensors": compressed,
    "fp8": fp8,
    "gptq": gptq,
    "modelopt": modelopt,
    "mxfp4": mxfp4,
}
# Files of one tool do not name it.
_BY_FILE = {
    "hf_quant_config.json": "modelopt",
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
}


def understand(note: QuantisationNote) -> Form:
    """Tell how weights are stored.

    Args:
        note: What the checkpoint announces.

    Returns:
        The form.

    Raises:
        UnreadableFormError: It is none that edgemoe reads.
    """
    method = note.settings.get("quant_method")
    if method is None and note.place.endswith("compression_config"):
        method = "compressed-tensors"
    elif method is None:
        method = _BY_FILE.get(note.place)
    if not isinstance(method, str) or method.lower() not in _METHODS:
        raise UnreadableFormError(str(note))
    return _METHODS[method.lower()](note.settings, str(note))
