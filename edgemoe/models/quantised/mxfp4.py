"""Mxfp4 as gpt-oss stores its experts: blocks of 32 with a power of two each. No torch.

Layout: `X_blocks` [experts, rows, blocks, 16] of two numbers a byte, the lower four bits first,
and `X_scales` [experts, rows, blocks]; the weight X [experts, 32 blocks, rows] is their
transpose. Source: `convert_moe_packed_tensors` of transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgemoe.models.quantised.form import Form, Piece, UnreadableFormError, check_entries, need

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from edgemoe.models.quantised.form import Headers

_ENTRIES = {"dequantize", "modules_to_not_convert", "quant_method"}
_BLOCKS, _SCALES = "_blocks", "_scales"
_BLOCK_BYTES = 16


def mxfp4(settings: Mapping[str, Any], where: str) -> Form:
    """Read an announcement of transformers' method `mxfp4`.

    Args:
        settings: What is announced.
        where: Where, for messages.

    Returns:
        The form.

    Raises:
        UnreadableFormError: It says something that is not known.
    """
    check_entries(settings, _ENTRIES, where)
    return Form(says="mxfp4 with a power of two for each 32 numbers", find=_find)


def _find(headers: Headers) -> Iterator[Piece]:
    for name, (dtype, shape) in headers.items():
        if not name.endswith(_BLOCKS):
            continue
        target = name.removesuffix(_BLOCKS)
        if dtype != "U8" or len(shape) != 4 or shape[3] != _BLOCK_BYTES:
            raise UnreadableFormError(
                f"{name} of type {dtype} and shape {shape}, where experts, rows, blocks and "
                f"{_BLOCK_BYTES} bytes of U8 are wanted"
            )
        experts, rows, blocks, _ = shape
        scales = need(headers, f"{target}{_SCALES}", name, ("U8",), ((experts, rows, blocks),))
        yield Piece(
            target=target,
            shape=(experts, 2 * _BLOCK_BYTES * blocks, rows),
            rule="mxfp4",
            parts={"blocks": name, "scales": scales},
            is_stack=True,
        )
