"""Which form an announcement means, and what it says besides. No torch."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from edgemoe.models.quantised.compressed import compressed
from edgemoe.models.quantised.form import UnreadableFormError
from edgemoe.models.quantised.fp8 import fp8, modelopt
from edgemoe.models.quantised.mxfp4 import mxfp4
from edgemoe.models.quantised.packed_columns import awq, gptq

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from edgemoe.models.quantised.form import Form, Headers
    from edgemoe.models.quantised.notes import QuantisationNote

_TYPES = ("bfloat16", "float16", "float32")
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
# Scales of what a layer takes in, gives out and caches: nothing of that is quantised here.
_OF_ACTIVATIONS = re.compile(
    r"^(.*)\.(?:(?:input|output|activation|[qkv])_scale|(?:input|output)_zero_point)$"
)


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


def held_type(content: Mapping[str, Any]) -> str:
    """Return the type that dequantised weights are held in.

    Args:
        content: The JSON object of config.json.

    Returns:
        Torch's name of the floating type that it names; bfloat16 where it names none.
    """
    parts = (content, *(part for part in content.values() if isinstance(part, dict)))
    found = (part.get(name) for part in parts for name in ("dtype", "torch_dtype"))
    return next((str(name) for name in found if name in _TYPES), _TYPES[0])


def find_unused(headers: Headers, made: Iterable[str]) -> list[str]:
    """List scales of activations that belong to quantised weights.

    Args:
        headers: All stored tensors.
        made: Names of the weights that are quantised.

    Returns:
        Their names.
    """
    # Of `self_attn.k_scale` the owner is what holds the projection.
    owners = {name.rpartition(".")[0] for name in made}
    owners |= {owner.rpartition(".")[0] for owner in owners}
    found = ((name, _OF_ACTIVATIONS.match(name)) for name in headers)
    return [name for name, match in found if match is not None and match[1] in owners]
