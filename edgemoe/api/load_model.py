"""Open a checkpoint in memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edgemoe.api.running import running

if TYPE_CHECKING:
    from edgemoe.api.arguments import StrPath
    from edgemoe.models.contract import MoeModel


def load_model(model: StrPath) -> MoeModel:
    """Open a Mixture-of-Experts checkpoint in memory, whole. Nothing is written.

    Args:
        model: Checkpoint directory in the format of Hugging Face, plain or as
            `edgemoe.apply_plan` and `edgemoe.recover` write it.

    Returns:
        The model in float32 on the CPU, in eval mode, without gradients: `.model` is the
        module of transformers, `.layers` are its MoE layers, `.shape` counts their experts.

    Raises:
        CheckpointError: The checkpoint is missing, a pickle, truncated or inconsistent.
        FamilyError: The family is not supported; the message lists those that are.
        MissingDependencyError: The extra `export` is not installed.

    Example:
        >>> from edgemoe import load_model
        >>> model = load_model("moe")
        >>> counts = model.shape.experts_per_layer
    """
    with running("export"):
        from edgemoe.models import load_model as load

        return load(Path(model))
