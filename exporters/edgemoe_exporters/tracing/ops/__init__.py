"""The custom ops of a traced model, with a reference implementation in torch.

Where engines differ, the trace keeps a computation whole, as nodes of the domain `edgemoe`:
Route (and SharedGates, for experts that every token uses and the router weighs), Experts (or
FactoredExperts), Attention (AttendAll where the model joins past and present itself, after
SelectKeys or SelectBlocks where it attends to some), LinearAttention, CausalConv and
JoinPositions (with NewMask, which hides padding from them), RotaryEmbedding (Angles where it
rotates in another way), PoolWindows, and RMSNorm. Each is a torch custom op, so that a model
prepared for tracing still runs eagerly.
Softplus is torch's own, kept whole because it must be computed in float32.

Letters in shapes: T tokens, B batch, S new tokens of a row, P cached tokens, E experts,
k chosen experts, H hidden size, I intermediate size of an expert, N query heads, M key and
value heads, D head size, V head size of values, R rotated part of a head, C channels and W
width of a convolution, L MoE layers.
"""

from __future__ import annotations

from edgemoe_exporters.tracing.ops.attention import (
    angles,
    attend_all,
    attention,
    rms_norm,
    rotary,
)
from edgemoe_exporters.tracing.ops.factored import factored_experts
from edgemoe_exporters.tracing.ops.moe import experts, route, shared_gates
from edgemoe_exporters.tracing.ops.recurrence import (
    causal_conv,
    join_positions,
    linear_attention,
    new_mask,
)
from edgemoe_exporters.tracing.ops.selection import select_blocks, select_keys
from edgemoe_exporters.tracing.ops.windows import pool_windows

__all__ = [
    "angles", "attend_all", "attention", "causal_conv", "experts", "factored_experts",
    "join_positions", "linear_attention", "new_mask", "pool_windows", "rms_norm", "rotary",
    "route", "select_blocks", "select_keys", "shared_gates",
]  # fmt: skip
