"""Load GGUF models without experts."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

from edgemoe.errors import CheckpointError
from edgemoe.models.loading import (
    GENERATION_FILE,
    check_fit,
    quiet_transformers,
    read_generation_settings,
    refusing_misfits,
)
from edgemoe.models.weights.tensor_files import list_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from edgemoe.models.checkpoint import Checkpoint


def load_dense_gguf(checkpoint: Checkpoint) -> PreTrainedModel:
    """Load a GGUF model without experts.

    Args:
        checkpoint: The checkpoint.

    Returns:
        The model in float32, in eval mode, without gradients.

    Raises:
        CheckpointError: Its tensors are not those of the model that it describes.
    """
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(checkpoint.configuration.whole)
    with refusing_misfits(checkpoint.path), quiet_transformers():
        with torch.device("meta"):
            model_class: Any = type(AutoModelForCausalLM.from_config(copy.deepcopy(config)))
        model, report = model_class.from_pretrained(
            None,
            config=config,
            state_dict={
                name: tensor.read() for name, tensor in list_tensors(checkpoint.weights).items()
            },
            dtype=torch.float32,
            output_loading_info=True,
        )
    check_fit(report, checkpoint.path)
    if report["unexpected_keys"]:
        raise CheckpointError(
            f"the weights in {checkpoint.path} must fit its metadata, got "
            f"{min(report['unexpected_keys'])}, which the model has no place for. Use the "
            "Hugging Face checkpoint that the file was made from."
        )
    read_generation_settings(model, checkpoint.path, checkpoint.read(GENERATION_FILE))
    found: PreTrainedModel = model.eval().requires_grad_(False)
    return found
