"""The ONNX domains of a graph's ops, and every key that edgemoe writes into `metadata_props`.

The keys are part of the bundle format: whoever writes or reads a graph takes them from here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    import onnx_ir as ir

DOMAIN = "edgemoe"
"""The domain of the custom ops of a trace; a lowered graph has none of them."""

MICROSOFT = "com.microsoft"
"""The domain of onnxruntime's fused ops."""

KEY_PREFIX = "edgemoe."
"""What all keys below begin with; a bundle's graphs keep no other metadata."""

EXPERT_AXIS = "edgemoe.expert_axis"
"""Of an initializer: the axis that counts the experts of one decoder layer."""

LAYER = "edgemoe.layer"
"""Of such an initializer: the index of that decoder layer."""

SETS_SHAPES = "edgemoe.sets_shapes"
"""Of a graph input: shapes inside the graph depend on its values."""

SAME_BYTES = "edgemoe.same_bytes"
"""Of a tensor: the name of an initializer of the same graph that has the same bytes."""


def mark_experts(value: ir.Value, axis: int, layer: int) -> None:
    """Mark an initializer that has experts along an axis, so that tasks can share them.

    Args:
        value: The initializer.
        axis: The axis that counts experts.
        layer: Index of the decoder layer.
    """
    value.metadata_props[EXPERT_AXIS] = str(axis)
    value.metadata_props[LAYER] = str(layer)


def stacked_layer(properties: Mapping[str, str]) -> int | None:
    """Return the decoder layer whose experts are stacked on a tensor's first axis.

    Args:
        properties: Metadata of the tensor or of its initializer.

    Returns:
        The layer's index; None where the first axis does not count experts.
    """
    if properties.get(EXPERT_AXIS) == "0" and LAYER in properties:
        return int(properties[LAYER])
    return None
