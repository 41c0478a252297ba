"""Open a dense checkpoint: a Hugging Face directory or a GGUF file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from edgemoe.errors import CarveError, CheckpointError
from edgemoe.evaluate.subject import load_dense as read_dense
from edgemoe.models.checkpoint import Checkpoint
from edgemoe.models.config.companions import copy_companions
from edgemoe.models.gguf.paths import find_gguf
from edgemoe.models.saving import save_plain
from edgemoe.models.weights.tensor_files import list_tensors

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DENSE_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Dense families whose attention the carved family can hold without a change."""


@dataclass(frozen=True, kw_only=True)
class DenseModel:
    """A dense decoder in float32, ready to be carved.

    Attributes:
        model: The causal language model, in eval mode.
        tokenizer: Its tokenizer.
        source: Where it came from.
        stored_types: Floating types that its tensors are stored in, by name; empty for GGUF
            files, whose types are no floating types.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: Path
    stored_types: Mapping[str, torch.dtype] = field(default_factory=dict)


def load_dense(source: Path) -> DenseModel:
    """Load a dense checkpoint in float32.

    Args:
        source: A Hugging Face directory with safetensors, a `.gguf` file, or a directory
            that holds exactly one `.gguf` file.

    Returns:
        The model and its tokenizer.

    Raises:
        CheckpointError: The path is missing, holds pickles only, or cannot be read.
        CarveError: The family is not one that can be carved.
    """
    if not source.exists():
        raise CheckpointError(f"a dense checkpoint must exist, got {source}. Check the path.")
    if find_gguf(source) is None and not (source / "config.json").is_file():
        raise CheckpointError(
            f"a dense checkpoint must hold config.json or one .gguf file, got {source}. "
            "Point at a Hugging Face directory or at a .gguf file."
        )
    from transformers import PreTrainedTokenizerFast

    checkpoint = Checkpoint(source)
    _check_family(str(checkpoint.configuration.whole.model_type))
    _ = checkpoint.weights
    # tokenizer.json as it is: the class that a family maps to may rewrite it.
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=checkpoint.tokenizer)
    model = read_dense(checkpoint).requires_grad_(True)
    stored = {} if checkpoint.gguf else list_tensors(checkpoint.weights)
    return DenseModel(
        model=model.eval(),
        tokenizer=tokenizer,
        source=source,
        stored_types={
            name: tensor.dtype
            for name, tensor in stored.items()
            if tensor.dtype.is_floating_point
        },
    )


def save_dense(dense: DenseModel, directory: Path) -> None:
    """Write a dense model and its tokenizer as a Hugging Face directory.

    Args:
        dense: The model.
        directory: An existing directory to fill.
    """
    save_plain(dense.model, directory, dense.stored_types)
    save_tokenizer(dense, directory)


def save_tokenizer(dense: DenseModel, directory: Path) -> None:
    """Write the tokenizer of a dense model, and what else came with it.

    Args:
        dense: The model.
        directory: An existing directory to fill.
    """
    copy_companions(dense.source, directory)


def _check_family(family: str) -> None:
    if family not in DENSE_FAMILIES:
        raise CarveError(
            "a dense model must be of a family that can be carved "
            f"({', '.join(DENSE_FAMILIES)}), got {family}."
        )
