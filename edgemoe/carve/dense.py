"""Open a dense checkpoint: a Hugging Face directory or a GGUF file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgemoe.errors import CarveError, CheckpointError
from edgemoe.evaluate.subject import load_dense as read_dense
from edgemoe.models.checkpoint import Checkpoint
from edgemoe.models.loading import check_fit, quiet_transformers
from edgemoe.models.saving import copy_companions, save_pretrained
from edgemoe_runtime.messages import clip

if TYPE_CHECKING:
    from pathlib import Path

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
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: Path


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
    gguf = _gguf_file(source)
    if gguf is not None:
        return _load_gguf(gguf, source)
    if not (source / "config.json").is_file():
        raise CheckpointError(
            f"a dense checkpoint must hold config.json or one .gguf file, got {source}. "
            "Point at a Hugging Face directory or at a .gguf file."
        )
    from transformers import PreTrainedTokenizerFast

    checkpoint = Checkpoint(source)
    _check_family(str(checkpoint.configuration.whole.model_type))
    _ = checkpoint.weights
    _check_tokenizer(source)
    model = read_dense(checkpoint).requires_grad_(True)
    try:
        # tokenizer.json as it is: the class that a family maps to may rewrite it.
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(source / "tokenizer.json"))
    except Exception as error:
        raise CheckpointError(
            f"{source} could not be read as a checkpoint: {clip(str(error))} Download or "
            "convert it again."
        ) from error
    return DenseModel(model=model.eval(), tokenizer=tokenizer, source=source)


def save_dense(dense: DenseModel, directory: Path) -> None:
    """Write a dense model and its tokenizer as a Hugging Face directory.

    Args:
        dense: The model.
        directory: An existing directory to fill.
    """
    save_pretrained(dense.model, directory)
    save_tokenizer(dense, directory)


def save_tokenizer(dense: DenseModel, directory: Path) -> None:
    """Write the tokenizer of a dense model, and what else came with it.

    Args:
        dense: The model.
        directory: An existing directory to fill.
    """
    if dense.source.is_file() or not (dense.source / "tokenizer.json").is_file():
        dense.tokenizer.save_pretrained(directory)
    if dense.source.is_dir():
        copy_companions(dense.source, directory)


def _gguf_file(source: Path) -> Path | None:
    if source.is_file():
        if source.suffix != ".gguf":
            raise CheckpointError(
                f"a checkpoint file must end in .gguf, got {source}. "
                "Point at a Hugging Face directory or at a .gguf file."
            )
        return source
    if (source / "config.json").is_file():
        return None
    files = sorted(source.glob("*.gguf"))
    if len(files) > 1:
        names = ", ".join(path.name for path in files)
        raise CheckpointError(
            f"a directory must hold one .gguf file, got {names} in {source}. "
            "Name the file itself."
        )
    return files[0] if files else None


def _load_gguf(file: Path, source: Path) -> DenseModel:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with quiet_transformers():
            loaded, report = AutoModelForCausalLM.from_pretrained(
                file.parent,
                gguf_file=file.name,
                dtype=torch.float32,
                local_files_only=True,
                output_loading_info=True,
            )
        check_fit(report, file)
        tokenizer = AutoTokenizer.from_pretrained(
            file.parent, gguf_file=file.name, local_files_only=True
        )
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{file} could not be read as GGUF: {error} Download it again."
        ) from error
    _check_family(loaded.config.model_type)
    # A model that carries a quantization_config refuses save_pretrained, although its
    # weights are plain float32 by now: rebuild it without.
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)
    settings.pop("_name_or_path", None)
    config = type(loaded.config)(**settings)
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    return DenseModel(model=model.eval(), tokenizer=tokenizer, source=source)


def _check_tokenizer(source: Path) -> None:
    if not (source / "tokenizer.json").is_file():
        raise CheckpointError(
            f"a dense checkpoint must hold tokenizer.json, got none in {source}. "
            "Save its tokenizer with a fast tokenizer of transformers."
        )


def _check_family(family: str) -> None:
    if family not in DENSE_FAMILIES:
        raise CarveError(
            "a dense model must be of a family that can be carved "
            f"({', '.join(DENSE_FAMILIES)}), got {family}."
        )
