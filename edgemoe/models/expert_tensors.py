"""What must change when a layer gets fewer experts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ExpertTensor:
    """A tensor with one entry per expert.

    Attributes:
        name: From the MoE block on, such as `experts.down_proj`.
        axis: Which axis counts experts.
        tail: Entries after those of the experts, which stay.
        holds_ids: Whether it holds ids of experts instead, on no axis.
    """

    name: str
    axis: int = 0
    tail: int = 0
    holds_ids: bool = False


@dataclass(frozen=True, kw_only=True)
class CountAttribute:
    """A number on a module that counts experts.

    Attributes:
        module: From the MoE block on; empty for the block itself.
        name: Attribute.
        tail: How much more than the experts it counts.
    """

    module: str
    name: str
    tail: int
