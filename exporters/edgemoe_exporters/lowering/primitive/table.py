"""The table of custom ops and the functions that decompose them, for both flavours."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgemoe_exporters.lowering.primitive.attention import (
    lower_angles,
    lower_attend_all,
    lower_attention,
    lower_norm,
    lower_rotary,
)
from edgemoe_exporters.lowering.primitive.recurrence import (
    lower_causal_conv,
    lower_join_positions,
    lower_linear_attention,
    lower_new_mask,
    lower_softplus,
)
from edgemoe_exporters.lowering.primitive.routing import lower_shared_gates
from edgemoe_exporters.lowering.primitive.selection import (
    lower_select_blocks,
    lower_select_keys,
)
from edgemoe_exporters.lowering.primitive.windows import lower_pool_windows

if TYPE_CHECKING:
    from collections.abc import Callable

    import onnx_ir as ir

    from edgemoe_exporters.graph.builder import Emitter
    from edgemoe_exporters.lowering.primitive.attention import Shared

LOWERINGS: dict[str, Callable[[Emitter, ir.Node], list[ir.Value]]] = {
    "RMSNorm": lower_norm,
    "NewMask": lower_new_mask,
    "Softplus": lower_softplus,
    "CausalConv": lower_causal_conv,
    "JoinPositions": lower_join_positions,
    "LinearAttention": lower_linear_attention,
    "SharedGates": lower_shared_gates,
    "PoolWindows": lower_pool_windows,
}
"""Ops that need nothing but their node."""

SHARING: dict[str, Callable[[Emitter, ir.Node, Shared], list[ir.Value]]] = {
    "Attention": lower_attention,
    "AttendAll": lower_attend_all,
    "SelectKeys": lower_select_keys,
    "SelectBlocks": lower_select_blocks,
    "Angles": lower_angles,
    "RotaryEmbedding": lower_rotary,
}
"""Ops that need masks or angles, which several layers have in common."""
