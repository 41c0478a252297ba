"""Contents of GGUF tensors: read by byte range, dequantised by the package `gguf`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from edgemoe.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from edgemoe.models.gguf.container import Block

# Read as they are; everything else becomes float32.
_FLOATS = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
}


def dtype_of(block: Block) -> torch.dtype:
    """Return the type in which a block's contents are given.

    Args:
        block: A stored tensor.

    Returns:
        Its own where it is a floating type; float32 for quantised blocks, whose values no
        shorter type holds exactly.
    """
    return _FLOATS.get(block.type_name, torch.float32)


def check_types(blocks: Iterable[Block]) -> None:
    """Refuse types that the package `gguf` cannot dequantise.

    Args:
        blocks: Stored tensors.

    Raises:
        CheckpointError: One has such a type.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    for type_id, block in {block.type_id: block for block in blocks}.items():
        if block.type_name in _FLOATS:
            continue
        kind = GGMLQuantizationType(type_id)
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except (NotImplementedError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{block.file} must hold weights that gguf can dequantise, got "
                f"{block.type_name} for {block.name!r:.100}. Use a file of another quantisation."
            ) from error


def read_block(block: Block, index: int | None = None) -> torch.Tensor:
    """Read a stored tensor, or one entry of its first dimension: one expert of a stack.

    Args:
        block: The stored tensor.
        index: Which entry; None reads all.

    Returns:
        Its contents, of type `dtype_of(block)`.

    Raises:
        CheckpointError: The file has become shorter than its header says.
    """
    shape = block.shape if index is None else block.shape[1:]
    begin, nbytes = block.begin, block.nbytes
    if index is not None:
        nbytes //= block.shape[0]
        begin += index * nbytes
    memory = np.empty(nbytes, np.uint8)
    with block.file.open("rb", buffering=0) as stream:
        stream.seek(begin)
        done = 0
        while done < nbytes:
            count = stream.readinto(memoryview(memory)[done:])
            if not count:
                raise CheckpointError(
                    f"{block.file} must hold {block.name!r:.100} up to byte {begin + nbytes}, "
                    "got a shorter file. It changed while it was read: download it again."
                )
            done += count
    if block.type_name in _FLOATS:
        return torch.from_numpy(memory).view(_FLOATS[block.type_name]).reshape(shape)
    from gguf import GGMLQuantizationType, dequantize

    rows = memory.reshape(math.prod(shape[:-1]), -1)
    return torch.from_numpy(dequantize(rows, GGMLQuantizationType(block.type_id))).reshape(
        shape
    )
