"""What config.json ties and a file stores twice, with different contents."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from edgemoe.models.weights.conversion import Conversion


def untie_what_differs(model: PreTrainedModel, conversion: Conversion) -> None:
    """Make a configuration agree with weights that it ties and that are not equal.

    transformers 5.24 keeps such weights apart and leaves the configuration as it is. Whoever
    reads a checkpoint that is written with it and obeys it has another model.

    Args:
        model: The model on the meta device; its configuration may be changed.
        conversion: How the checkpoint's tensors become the model's.
    """
    groups = {target: group for group in conversion.groups for target in group.targets}
    for pair in list(model.all_tied_weights_keys.items()):
        if all(name in groups for name in pair):
            one, two = (dict(conversion.read(groups[name]))[name] for name in pair)
            if not torch.equal(one, two):
                del model.all_tied_weights_keys[pair[0]]
    tell_ties(model)


def tell_ties(model: PreTrainedModel) -> None:
    """Make a configuration that ties weights say so no more where the model ties none.

    Args:
        model: The model, its ties settled.
    """
    if getattr(model.config, "tie_word_embeddings", False) and not model.all_tied_weights_keys:
        model.config.tie_word_embeddings = False
