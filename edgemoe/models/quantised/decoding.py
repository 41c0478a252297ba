"""The arithmetic that turns stored parts of a weight into the weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch

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


RULES: dict[str, Rule] = {"scaled": scaled}
