"""Open checkpoints, and refuse the unsafe and the broken before any weight is read."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch

from edgemoe.errors import CheckpointError, EdgemoeError, FamilyError
from edgemoe.models.adapter import adapt_model
from edgemoe.models.discovery import build_skeleton, discover
from edgemoe.models.experts import is_experts_module
from edgemoe.models.k_policy import put_k_policy, read_k_policy
from edgemoe.models.ragged import make_ragged_class, read_ragged_note, resize_layers
from edgemoe.models.registry import find_family
from edgemoe.models.safety import check_directory, check_weights, read_json_object
from edgemoe.models.transformers_internals import read_special_floats

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from tokenizers import Tokenizer
    from transformers import PreTrainedConfig, PreTrainedModel

    from edgemoe.models.contract import MoeModel
    from edgemoe.models.registry import Family
    from edgemoe.models.shapes import ModelShape

_ALIGNMENT_BYTES = 64
# What torch and transformers raise when weights and configuration contradict each other.
_MISFITS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


def load_model(path: Path, dtype: torch.dtype = torch.float32) -> MoeModel:
    """Open a checkpoint.

    Args:
        path: Checkpoint directory.
        dtype: Floating type to hold the weights in.

    Returns:
        The model, in eval mode, without gradients.

    Raises:
        FamilyError: The family is not supported; found before weights are looked at.
        CheckpointError: The checkpoint is missing, a pickle, truncated or inconsistent.
    """
    family, config = read_config(path)
    note = read_ragged_note(path)
    check_weights(path)
    with refusing_misfits(path):
        facts = discover(family, config)
    base = family.causal_lm
    model_class = base if note is None else make_ragged_class(family, note, facts)
    with refusing_misfits(path), quiet_transformers():
        model, report = model_class.from_pretrained(
            str(path),
            config=config,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    model.__class__ = base
    check_fit(report, path)
    _align_tensors(model)
    found = adapt_model(model, path, _stored_dtype(config, dtype), facts)
    put_k_policy(found, read_k_policy(path))
    return found


def check_fit(report: Mapping[str, Any], path: Path) -> None:
    """Refuse weights that left a part of the model at random values.

    Args:
        report: What ``from_pretrained`` with ``output_loading_info`` told.
        path: The checkpoint.

    Raises:
        CheckpointError: Tensors are missing, or have another shape than the configuration says.
    """
    unfit = sorted(str(key) for key in (*report["missing_keys"], *report["mismatched_keys"]))
    if unfit:
        raise CheckpointError(
            f"the weights in {path} must fit its config.json, got {len(unfit)} tensors missing "
            f"or of another shape, such as {unfit[0]}. Copy the checkpoint again."
        )


def read_config(path: Path) -> tuple[Family, PreTrainedConfig]:
    """Read the configuration of a checkpoint; weights are not touched.

    Args:
        path: Checkpoint directory.

    Returns:
        Family and configuration.

    Raises:
        FamilyError: The family is not supported.
        CheckpointError: The directory or its config.json is missing or malformed.
    """
    check_directory(path)
    content = read_json_object(path / "config.json")
    family = find_family(content.get("model_type"))
    if content.get("quantization_config") is not None:
        raise CheckpointError(
            f"{path} must hold plain weights, got quantization_config in config.json. Use the "
            "checkpoint that it was quantised from."
        )
    try:
        config = _configuration(content).get_text_config(decoder=True)
        return find_family(config.model_type), config
    except Exception as error:  # the strict dataclasses of the hub raise classes of their own
        raise CheckpointError(
            f"{path / 'config.json'} must be a {family.model_type} configuration, got: "
            f"{error}. Correct the entry."
        ) from error


def has_experts(path: Path) -> bool:
    """Ask whether a checkpoint is a Mixture-of-Experts model that edgemoe can open.

    Args:
        path: Checkpoint directory.

    Returns:
        Whether its configuration makes layers with experts.

    Raises:
        CheckpointError: The directory or its config.json is missing or malformed.
    """
    try:
        family, config = read_config(path)
    except FamilyError:
        return False
    skeleton = build_skeleton(family, config)
    return any(is_experts_module(module) for module in skeleton.modules())


def read_shape(path: Path) -> ModelShape:
    """Read how many experts each layer of a checkpoint has; weights are not loaded.

    Args:
        path: Checkpoint directory.

    Returns:
        The shape.

    Raises:
        FamilyError: The family is not supported.
        CheckpointError: The directory or its configuration is missing or malformed.
    """
    return read_structure(path).shape


def read_structure(path: Path) -> MoeModel:
    """Read how a checkpoint is built; weights are not loaded.

    Args:
        path: Checkpoint directory.

    Returns:
        A view of the model on the meta device.

    Raises:
        FamilyError: The family is not supported.
        CheckpointError: The directory or its configuration is missing or malformed.
    """
    family, config = read_config(path)
    note = read_ragged_note(path)
    with refusing_misfits(path):
        facts = discover(family, config)
        skeleton = build_skeleton(family, config)
        if note is not None:
            resize_layers(skeleton, facts, note)
        found = adapt_model(skeleton, facts=facts)
    put_k_policy(found, read_k_policy(path))
    return found


def _configuration(content: Mapping[str, Any]) -> PreTrainedConfig:
    from transformers import CONFIG_MAPPING

    configuration = CONFIG_MAPPING[content["model_type"]]
    # JSON has no infinity; transformers writes it as an object.
    found: PreTrainedConfig = configuration.from_dict(
        read_special_floats(configuration, content)
    )
    return found


def load_tokenizer(path: Path) -> Tokenizer:
    """Open the tokenizer of a checkpoint, with the library that the runtime uses.

    Args:
        path: Checkpoint directory.

    Returns:
        The tokenizer, without truncation or padding.

    Raises:
        CheckpointError: tokenizer.json is missing or malformed.
    """
    from tokenizers import Tokenizer

    check_directory(path)
    file = path / "tokenizer.json"
    if not file.exists():
        raise CheckpointError(
            f"a checkpoint must have tokenizer.json, got none in {path}. Copy it from the "
            "original model, or write it with "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...)."
        )
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises Exception itself
        raise CheckpointError(
            f"{file} must be a tokenizer of the tokenizers library, got: {error}. Copy it "
            "again."
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the progress bars of transformers: they draw even where nobody watches.

    Yields:
        Nothing.
    """
    from transformers.utils import logging

    drew = logging.is_progress_bar_enabled()
    level = logging.get_verbosity()
    logging.disable_progress_bar()
    # What its report would say is refused here, or does not matter.
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if drew:
            logging.enable_progress_bar()


@contextlib.contextmanager
def refusing_misfits(path: Path) -> Iterator[None]:
    """Turn what torch and transformers raise on inconsistent checkpoints into a refusal.

    Args:
        path: The checkpoint.

    Yields:
        Nothing.

    Raises:
        CheckpointError: Weights and configuration contradict each other.
    """
    try:
        yield
    except EdgemoeError:
        raise
    except _MISFITS as error:
        raise CheckpointError(
            f"the weights in {path} must fit its config.json, got: {error}. Copy the "
            "checkpoint again, or correct config.json."
        ) from error


def _align_tensors(model: PreTrainedModel) -> None:
    """Move tensors to aligned memory.

    Matrix products round differently on memory that is mapped from a file at an odd offset, so
    the same weights in two files would give logits that differ in the last bits.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.data_ptr() % _ALIGNMENT_BYTES:
            tensor.data = tensor.data.clone()


def _stored_dtype(config: Any, default: torch.dtype) -> torch.dtype:
    found = getattr(config, "dtype", None)
    if isinstance(found, str):
        found = getattr(torch, found, None)
    return found if isinstance(found, torch.dtype) and found.is_floating_point else default
