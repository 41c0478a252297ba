"""What a decoder layer hands to the layers after it.

Most return all that the next one needs. Some families also give every layer one dictionary, in
which a layer leaves states that later ones read (in transformers 5.24 `shared_kv_states` of
gemma4 and mistral_large4, filled also where no layer reads it); what is in it is then carried
from layer to layer beside what they return.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from edgemoe.errors import StreamingError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

# What a decoder layer hands on: a tensor, or (nested) tuples of tensors and None, or these with
# what is in the dictionaries that all layers are given.
Outputs: TypeAlias = "torch.Tensor | tuple[Any, ...] | Sharing | None"
# What is in those, by the name of the argument and the key in it.
Shared: TypeAlias = "Mapping[str, Mapping[str, Outputs]]"


@dataclass(frozen=True)
class Sharing:
    """What a layer returned, and what it and those before it left in dictionaries of all.

    Attributes:
        returned: What it returned.
        shared: What is in them; argument and key are strings.
    """

    returned: Outputs
    shared: Shared


def map_tensors(outputs: Outputs, change: Callable[[torch.Tensor], Any]) -> Any:
    """Apply a function to every tensor that a layer hands on.

    Args:
        outputs: What it hands on.
        change: The function.

    Returns:
        The same structure with the results.
    """
    if outputs is None:
        return None
    if isinstance(outputs, torch.Tensor):
        return change(outputs)
    if isinstance(outputs, Sharing):
        shared = {
            name: {key: map_tensors(value, change) for key, value in entries.items()}
            for name, entries in outputs.shared.items()
        }
        return Sharing(map_tensors(outputs.returned, change), shared)
    return tuple(map_tensors(item, change) for item in outputs)


def hidden_of(outputs: Outputs) -> torch.Tensor:
    """Find the hidden states among what a layer hands on.

    Args:
        outputs: What it hands on.

    Returns:
        The first tensor that it returned, `[rows, tokens, hidden]`.
    """
    while not isinstance(outputs, torch.Tensor):
        assert outputs is not None
        outputs = outputs.returned if isinstance(outputs, Sharing) else outputs[0]
    return outputs


def check_returned(returned: Any, layer: str) -> Outputs:
    """Refuse what cannot be stored.

    Args:
        returned: What a decoder layer returned.
        layer: Which layer, for the message.

    Returns:
        The same, detached.

    Raises:
        StreamingError: There is something else in it than tensors, tuples and None.
    """
    if returned is None:
        return None
    if isinstance(returned, torch.Tensor):
        return returned.detach()
    if type(returned) is tuple:
        return tuple(check_returned(item, layer) for item in returned)
    raise StreamingError(
        "a decoder layer must return tensors or tuples of them, got a "
        f"{type(returned).__name__} from {layer}."
    )
