"""Where a transformers model keeps its decoder layers."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, cast

from torch import nn

from edgemoe.errors import StreamingError

if TYPE_CHECKING:
    from typing import Any

    from transformers import PreTrainedModel


def find_layers(model: PreTrainedModel) -> tuple[nn.Module, nn.ModuleList, str]:
    """Find a model's decoder layers.

    Args:
        model: The model.

    Returns:
        Its decoder, the decoder's layers, and the name of their list in the model.

    Raises:
        StreamingError: The decoder keeps its layers otherwise.
    """
    decoder = cast("Any", model).get_decoder()
    layers = getattr(decoder, "layers", None)
    names = {id(module): name for name, module in model.named_modules()}
    if not isinstance(layers, nn.ModuleList) or id(layers) not in names:
        raise StreamingError(
            f"a decoder must keep its layers in a list, got {type(decoder).__name__}, which "
            "does not."
        )
    return decoder, layers, names[id(layers)]


def cache_name(model: PreTrainedModel) -> str:
    """Return what a model calls its cache, as an argument and in what it returns.

    Args:
        model: The model.

    Returns:
        `cache` from transformers 5.24 on, which warns of the other name: `past_key_values`.
    """
    forwards = (type(model).forward, type(model.get_decoder()).forward)
    named = any("cache" in inspect.signature(forward).parameters for forward in forwards)
    return "cache" if named else "past_key_values"
