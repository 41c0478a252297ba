"""Contents of GGUF tensors: read by byte range, dequantised by the package `gguf`. No torch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from edgemoe.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy.typing as npt

    from edgemoe.models.gguf.container import Block

PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
"""Types that are read as they are, by torch's names; everything else becomes float32."""
_NUMPY: dict[str, Any] = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": np.int16,
    "F64": np.float64,
}


def dtype_name(block: Block) -> str:
    """Return the type in which a block's contents are given, by torch's name.

    Args:
        block: A stored tensor.

    Returns:
        Its own where it is a floating type; float32 for quantised blocks, whose values no
        shorter type holds exactly.
    """
    return PLAIN.get(block.type_name, "float32")


def check_types(blocks: Iterable[Block]) -> None:
    """Refuse types that the package `gguf` cannot dequantise.

    Args:
        blocks: Stored tensors.

    Raises:
        CheckpointError: One has such a type.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    for type_id, block in {block.type_id: block for block in blocks}.items():
        if block.type_name in PLAIN:
            continue
        kind = GGMLQuantizationType(type_id)
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except (NotImplementedError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{block.file} must hold weights that gguf can dequantise, got "
                f"{block.type_name} for {block.name!r:.100}. Use a file of another "
                "quantisation."
            ) from error


def read_values(block: Block, index: int | None = None) -> npt.NDArray[Any]:
    """Read a stored tensor, or one entry of its first dimension: one expert of a stack.

    Args:
        block: The stored tensor.
        index: Which entry; None reads all.

    Returns:
        Its contents; float32 where it is quantised, and int16 with the bits of bfloat16, which
        NumPy does not have.

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
            count = stream.readinto(memory[done:].data)
            if not count:
                raise CheckpointError(
                    f"{block.file} must hold {block.name!r:.100} up to byte {begin + nbytes}, "
                    "got a shorter file. It changed while it was read: download it again."
                )
            done += count
    if block.type_name in PLAIN:
        plain: npt.NDArray[Any] = memory.view(_NUMPY[block.type_name]).reshape(shape)
        return plain
    from gguf import GGMLQuantizationType, dequantize

    rows = memory.reshape(math.prod(shape[:-1]), -1)
    found: npt.NDArray[Any] = dequantize(rows, GGMLQuantizationType(block.type_id))
    return found.reshape(shape)
