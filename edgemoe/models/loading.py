"""Load weights with transformers: in silence, and refusing what does not fit."""

from __future__ import annotations

import contextlib
import json
import math
from typing import TYPE_CHECKING, Any

import torch

from edgemoe.errors import CheckpointError, EdgemoeError
from edgemoe_runtime.messages import clip

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from transformers import PreTrainedModel

    from edgemoe.models.stored_tensors import StoredTensor

GENERATION_FILE = "generation_config.json"
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


def check_fit(report: Mapping[str, Any], path: Path) -> None:
    """Refuse weights that left a part of the model at random values.

    Args:
        report: What `from_pretrained` with `output_loading_info` told.
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
            f"the weights in {path} must fit its config.json, got: {_in_a_line(error)}. Copy "
            "the checkpoint again, or correct config.json."
        ) from error


def _in_a_line(error: Exception) -> str:
    """Say what another library raised: without the stack that torch puts behind it."""
    line = clip(next(iter(str(error).splitlines()), "") or type(error).__name__)
    # What a mapping lacks says nothing by itself.
    return f"no such entry as {line}" if isinstance(error, KeyError) else line


def read_generation_settings(
    model: PreTrainedModel, path: Path, content: bytes | None = None
) -> None:
    """Give a model the generation settings of its checkpoint, where that has some.

    Args:
        model: The model.
        path: The checkpoint.
        content: Content of its settings, where they are no file of a directory.
    """
    from transformers import GenerationConfig

    if content is not None:
        model.generation_config = GenerationConfig.from_dict(json.loads(content))
    elif (path / GENERATION_FILE).exists():
        model.generation_config = GenerationConfig.from_pretrained(str(path))


def refuse_not_finite(name: str, tensor: torch.Tensor) -> None:
    """Refuse a weight that is not a number, or infinite.

    Most engines turn what such a weight makes into zeros or another expert, and say nothing.

    Args:
        name: Its name in the model.
        tensor: The weight; one on the meta device has no contents.

    Raises:
        CheckpointError: It has a value that is not finite.
    """
    if tensor.is_meta or not tensor.is_floating_point() or not tensor.numel():
        return
    # Both are NaN where any value is; this reads memory as fast as it can be read.
    least, most = torch.aminmax(tensor)
    if not (math.isfinite(least.item()) and math.isfinite(most.item())):
        kind = "NaN" if tensor.isnan().any() else "infinity"
        raise CheckpointError(
            f"weights must be finite numbers, got {kind} in {clip(name)}. Copy the checkpoint "
            "again; where it stays, its training diverged: use an earlier one."
        )


def finite_chunks(name: str, dtype: torch.dtype, chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Refuse a weight that is copied byte by byte as `refuse_not_finite` does one that is read.

    Args:
        name: Its name.
        dtype: Its type.
        chunks: Its bytes, in order, cut anywhere.

    Yields:
        The same bytes.

    Raises:
        CheckpointError: It has a value that is not finite.
    """
    left = b""
    for chunk in chunks:
        values = left + chunk
        whole = len(values) - len(values) % dtype.itemsize
        left = values[whole:]
        if whole and dtype.is_floating_point:
            numbers = torch.frombuffer(bytearray(values[:whole]), dtype=dtype)
            refuse_not_finite(name, numbers)
        yield chunk


def settle_weights(model: PreTrainedModel, stored: Mapping[str, StoredTensor]) -> None:
    """Make what transformers loaded what the checkpoint holds, aligned and finite.

    transformers 5.24 initialises modules after it loaded them; a class that assigns to a part
    of a buffer then loses what was loaded (the last balancing bias of ZAYA).

    Args:
        model: The model, just loaded.
        stored: The checkpoint's tensors by name.

    Raises:
        CheckpointError: A weight has a value that is not finite.
    """
    for name, buffer in model.named_buffers():
        if name in stored and stored[name].shape == tuple(buffer.shape):
            buffer.copy_(stored[name].read())
    align_tensors(model)
    for name, tensor in model.state_dict().items():
        refuse_not_finite(name, tensor)


def align_tensors(model: PreTrainedModel) -> None:
    """Move tensors to aligned memory.

    Matrix products round differently on memory that is mapped from a file at an odd offset, so
    the same weights in two files would give logits that differ in the last bits.

    Args:
        model: The model that they are of.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.data_ptr() % _ALIGNMENT_BYTES:
            tensor.data = tensor.data.clone()


def stored_dtype(config: Any) -> torch.dtype | None:
    """Return the floating type that a configuration says the weights are stored in.

    Args:
        config: The configuration.

    Returns:
        The type; None where it names none.
    """
    found = getattr(config, "dtype", None)
    if isinstance(found, str):
        found = getattr(torch, found, None)
    return found if isinstance(found, torch.dtype) and found.is_floating_point else None
