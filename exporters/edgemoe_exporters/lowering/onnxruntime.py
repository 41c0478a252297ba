"""Lower a traced model to ops of onnxruntime, on a CPU or on CUDA.

Past and present of a layer may be one buffer `[B, heads, slots, size]`: the attention mask
`[B, total]` says how many slots are in use. A batch of more than one row cannot read several
new tokens after a past (a limit of GroupQueryAttention on a CPU): read prompts whole.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnx_ir.passes.common import TopologicalSortPass

from edgemoe.errors import ExportError
from edgemoe_exporters.graph.editor import Editor
from edgemoe_exporters.graph.metadata import DOMAIN, MICROSOFT
from edgemoe_exporters.lowering.fused.attention import lower_attention
from edgemoe_exporters.lowering.fused.half import convert_to_half
from edgemoe_exporters.lowering.fused.linear import lower_embedding, lower_linears
from edgemoe_exporters.lowering.fused.moe import lower_moe
from edgemoe_exporters.lowering.fused.norms import lower_activations, lower_norms
from edgemoe_exporters.lowering.fused.recurrence import lower_recurrence
from edgemoe_exporters.precision import find_precision

if TYPE_CHECKING:
    from collections.abc import Callable

    import onnx_ir as ir

    from edgemoe_exporters.precision import Precision

# In this order: types first, then ops recognised by the standard ops around them.
_STEPS: dict[str, Callable[[Editor, Precision], None]] = {
    "half": convert_to_half,
    "linears": lower_linears,
    "embedding": lower_embedding,
    "attention": lower_attention,
    "recurrence": lower_recurrence,
    "moe": lower_moe,
    "norms": lower_norms,
    "activations": lower_activations,
}


def lower(model: ir.Model, precision: str) -> ir.Model:
    """Lower a traced model.

    Args:
        model: What `tracing.trace.trace` returned; it is not changed.
        precision: `fp32`, `fp16`, `int8` or `int4`.

    Returns:
        A new graph. Initializers with experts along an axis are marked, see `graph.metadata`.

    Raises:
        ExportError: The precision is unknown, or a traced op has no lowering.
    """
    meaning = find_precision(precision)
    lowered = model.clone()
    editor = Editor(lowered)
    for step in _STEPS.values():
        step(editor, meaning)
        editor.tidy()
    left = sorted({node.op_type for node in lowered.graph if node.domain == DOMAIN})
    if left:
        raise ExportError(
            f"every traced op must have a lowering for onnxruntime, got {', '.join(left)}. "
            "Choose another target."
        )
    # Values that all layers share come first, after the nodes that compute their inputs.
    TopologicalSortPass()(lowered)
    lowered.opset_imports.pop(DOMAIN, None)
    lowered.opset_imports[MICROSOFT] = 1
    return lowered
