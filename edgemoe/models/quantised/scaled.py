"""Weights of one byte with scales beside them: FP8 and int8, by tensor, row, group or block.

Sources: DeepSeek-V3's `weight_scale_inv` of blocks, ModelOpt's and compressed-tensors'
`weight_scale`. No torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgemoe.models.quantised.form import Piece, UnreadableFormError, need

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from edgemoe.models.quantised.form import Headers, Shape

_ZEROS = "_zero_point"
FLOATS = ("F32", "F16", "BF16")


def find_scaled(
    headers: Headers,
    stored: str,
    suffixes: Collection[str],
    spans: Collection[str],
    *,
    block: tuple[int, int] | None = None,
    group: int | None = None,
    with_zeros: bool = False,
    in_scale_type: bool = False,
) -> Iterator[Piece]:
    """List the weights of one byte.

    Args:
        headers: All stored tensors.
        stored: Their type, such as `F8_E4M3`.
        suffixes: What a scale's name may have behind its weight's.
        spans: What one scale may hold for: `tensor`, `channel`, `group` or `block`.
        block: Rows and columns of a block.
        group: Columns of a group.
        with_zeros: Whether zero points are stored besides.
        in_scale_type: Whether the product is rounded to the scales' type first.

    Yields:
        The weights.

    Raises:
        UnreadableFormError: A weight has no scales, or such of another shape.
    """
    for name, (dtype, listed) in headers.items():
        if dtype != stored or len(listed) < 2 or (with_zeros and name.endswith(_ZEROS)):
            continue
        shape = tuple(listed)
        scales = [f"{name}{suffix}" for suffix in suffixes]
        scale = next((one for one in scales if one in headers), scales[0])
        shapes = {
            one: span for span in spans for one in _scale_shapes(shape, span, block, group)
        }
        parts = {"weight": name, "scale": need(headers, scale, name, FLOATS, tuple(shapes))}
        if with_zeros:
            found = tuple(headers[scale][1])
            zeros = f"{name}{_ZEROS}"
            parts["zeros"] = need(headers, zeros, name, (stored,), (found,))
        yield Piece(
            target=name,
            shape=shape,
            rule="scaled",
            parts=parts,
            settings={
                "span": shapes[tuple(headers[scale][1])],
                "block": block,
                "group": group,
                "in_scale_type": in_scale_type,
            },
            is_stack=len(shape) == 3,
        )


def _scale_shapes(
    shape: Shape, span: str, block: tuple[int, int] | None, group: int | None
) -> list[Shape]:
    *lead, rows, columns = shape
    if span == "block":
        high, wide = block or (1, 1)
        return [(*lead, -(-rows // high), -(-columns // wide))]
    if span == "group":
        if group is None or columns % group:
            raise UnreadableFormError(f"groups of {group} in rows of {columns}")
        return [(*lead, rows, columns // group)]
    if span == "channel":
        return [(*lead, rows, 1), *([] if lead else [(rows,)])]
    return [(*lead, 1, 1), tuple(lead)] if lead else [(), (1,), (1, 1)]
