"""Which axis of an experts module's tensors holds its intermediate channels."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from edgemoe.models.discovery import LayerSpec

# What families call the width on their experts modules; some kernels ask for it.
_ATTRIBUTES = ("intermediate_dim", "intermediate_size", "ffn_dim", "expert_dim")


def width_axis(spec: LayerSpec, name: str) -> int | None:
    """Return which axis of a tensor has one entry per intermediate channel, or a multiple.

    Args:
        spec: How a layer of whole experts is built.
        name: A tensor, from the block on.

    Returns:
        The axis; None for a tensor without intermediate channels.
    """
    part = name.removeprefix(f"{spec.experts}.")
    return spec.layout.width_axis(part) if part in spec.layout.names else None


def follow_width(experts: nn.Module, before: int, after: int) -> None:
    """Set an experts module's own numbers to its new width.

    Args:
        experts: The module.
        before: Its width as the numbers say it.
        after: Its width as the tensors have it.
    """
    for name in _ATTRIBUTES:
        if vars(experts).get(name) == before:
            setattr(experts, name, after)
