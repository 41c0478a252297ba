"""The arithmetic that turns stored parts of a weight into the weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

Parts: TypeAlias = "Mapping[str, torch.Tensor]"
Rule: TypeAlias = "Callable[[Parts, Mapping[str, Any], torch.dtype], torch.Tensor]"


def scaled(parts: Parts, settings: Mapping[str, Any], dtype: torch.dtype) -> torch.Tensor:
    """Multiply numbers of one byte with their scales, in float32.

    Args:
        parts: `weight` [rows, columns], `scale` and possibly `zeros`, both as `span` says.
        settings: `span`, `block` and `group`; with `in_scale_type` the product is rounded to
            the scales' type first, as compressed-tensors does.
        dtype: Type of the result.

    Returns:
        The weight [rows, columns].
    """
    rows, columns = parts["weight"].shape
    values = parts["weight"].float()
    if "zeros" in parts:
        values = values - _spread(parts["zeros"], rows, columns, settings).float()
    scale = parts["scale"]
    product = values * _spread(scale, rows, columns, settings).float()
    return (product.to(scale.dtype) if settings["in_scale_type"] else product).to(dtype)


def _spread(
    scale: torch.Tensor, rows: int, columns: int, settings: Mapping[str, Any]
) -> torch.Tensor:
    """Give every number its scale; the last block of a side may be narrower."""
    span = settings["span"]
    if span == "block":
        high, wide = settings["block"]
        tall = scale.repeat_interleave(high, 0)[:rows]
        return tall.repeat_interleave(wide, 1)[:, :columns]
    if span == "group":
        return scale.repeat_interleave(settings["group"], 1)
    return scale.reshape(-1, 1)


def mxfp4(parts: Parts, settings: Mapping[str, Any], dtype: torch.dtype) -> torch.Tensor:
    """Read one expert's numbers of four bits.

    Args:
        parts: `blocks` uint8 [rows, blocks, 16] and `scales` uint8 [rows, blocks].
        settings: None are needed.
        dtype: Type of the result.

    Returns:
        The weight [32 blocks, rows].
    """
    del settings
    blocks, scales = parts["blocks"], parts["scales"]
    # Two numbers of four bits in a byte, the lower first: a table of all pairs.
    pairs = torch.tensor([[low, high] for high in _FP4 for low in _FP4])
    numbers = pairs[blocks.int()].reshape(*scales.shape, -1)
    exponents = (scales.int() - 127).unsqueeze(-1)
    values: torch.Tensor = torch.ldexp(numbers, exponents)
    rows: torch.Tensor = values.reshape(len(blocks), -1).T
    return rows.to(dtype)


# Sign, two bits of exponent, one of mantissa.
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def unpack(words: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """Take the numbers out of words of 32 bits, from the lowest bits on.

    Args:
        words: int32 [rows, columns].
        bits: Bits of a number, a divisor of 32.
        dim: The side that they are packed along.

    Returns:
        int32, 32 / bits times as long on that side, 0 to 2^bits - 1.
    """
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    shifts = shifts.view(1, -1, 1) if dim == 0 else shifts
    # The sign of a word is a number's highest bit: what a shift fills in is masked away.
    found = (words.unsqueeze(dim + 1) >> shifts) & (2**bits - 1)
    flat: torch.Tensor = found.flatten(dim, dim + 1)
    return flat


def gptq(parts: Parts, settings: Mapping[str, Any], dtype: torch.dtype) -> torch.Tensor:
    """Read numbers that are packed along the inputs.

    Args:
        parts: `weight` int32 [inputs * bits / 32, outputs], `zeros` int32
            [groups, outputs * bits / 32], `scale` [groups, outputs], and `order` [inputs], the
            group of each input, where these are not in order.
        settings: `bits`, `group`, and `less_one` where zero points are stored so.
        dtype: Type of the result.

    Returns:
        The weight [outputs, inputs]; products are rounded to the scales' type first.

    Raises:
        ValueError: `order` names a group that does not exist.
    """
    bits, scale = settings["bits"], parts["scale"]
    numbers = unpack(parts["weight"], bits, 0)
    zeros = unpack(parts["zeros"], bits, 1)[:, : scale.shape[1]]
    if settings["less_one"]:
        # Of a zero point of 0 the highest number is stored.
        zeros = (zeros + 1) & (2**bits - 1)
    order = parts.get("order")
    if order is None:
        order = torch.arange(len(numbers)) // settings["group"]
    elif order.min() < 0 or order.max() >= len(scale):
        # A negative one would count from the end.
        raise ValueError(f"inputs in groups {order.min()} to {order.max()} of {len(scale)}")
    return _grouped(numbers, zeros, scale, order.long()).T.to(dtype)


def awq(parts: Parts, settings: Mapping[str, Any], dtype: torch.dtype) -> torch.Tensor:
    """Read numbers of four bits that are packed along the outputs in the order of AWQ.

    Args:
        parts: `weight` int32 [inputs, outputs / 8], `zeros` int32 [groups, outputs / 8] and
            `scale` [groups, outputs].
        settings: `group`.
        dtype: Type of the result.

    Returns:
        The weight [outputs, inputs]; products are rounded to the scales' type first.
    """
    numbers, zeros = (
        unpack(parts[name], 4, 1).reshape(len(parts[name]), -1, 8)[..., _AWQ_ORDER].flatten(1)
        for name in ("weight", "zeros")
    )
    order = torch.arange(len(numbers)) // settings["group"]
    return _grouped(numbers, zeros, parts["scale"], order).T.to(dtype)


# Where in a word each of eight outputs lies.
_AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]


def _grouped(
    numbers: torch.Tensor, zeros: torch.Tensor, scale: torch.Tensor, order: torch.Tensor
) -> torch.Tensor:
    """Return scale * (number - zero) in the scales' type, [inputs, outputs]."""
    return ((numbers - zeros[order]).float() * scale[order].float()).to(scale.dtype)


def packed_rows(parts: Parts, settings: Mapping[str, Any], dtype: torch.dtype) -> torch.Tensor:
    """Read numbers that compressed-tensors packed along the inputs of each row.

    Args:
        parts: `weight` int32 [rows, words], `scale` [rows, groups], `shape` of the weight, and
            possibly `zeros` int32 [rows * bits / 32, groups].
        settings: `bits`, `group` and the `shape` that the headers tell.
        dtype: Type of the result.

    Returns:
        The weight [rows, columns]; products are rounded to the scales' type first.

    Raises:
        ValueError: `shape` is another one than the headers tell.
    """
    bits, scale, shape = settings["bits"], parts["scale"], settings["shape"]
    if parts["shape"].tolist() != shape:
        raise ValueError(
            f"a packed weight of shape {shape}, stored as {parts['shape'].tolist()}"
        )
    rows, columns = shape
    half = 2 ** (bits - 1)
    numbers = unpack(parts["weight"], bits, 1)[:, :columns] - half
    order = torch.arange(columns) // settings["group"]
    if "zeros" in parts:
        zeros = unpack(parts["zeros"], bits, 0)[:rows] - half
        numbers = numbers - zeros[:, order]
    product: torch.Tensor = numbers.float() * scale[:, order].float()
    return product.to(scale.dtype).to(dtype)


RULES: dict[str, Rule] = {
    "awq": awq,
    "gptq": gptq,
    "mxfp4": mxfp4,
    "packed_rows": packed_rows,
    "scaled": scaled,
}
