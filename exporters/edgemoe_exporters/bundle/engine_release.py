"""Which release of onnxruntime a graph needs: the first that has all of its operators.

onnxruntime refuses a graph with an attribute that it does not know, whatever its value is. What
each release has was read from the schemas of 1.23.2, 1.24.4, 1.25.1 and 1.26.0 to 1.32.0
(`onnxruntime_pybind11_state.get_all_operator_schema`), opset and IR version from graphs that
each of them loads; `make test-onnxruntime` runs bundles on several. The table has all
attributes of an operator, of which the lowering writes some.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from edgemoe.errors import ExportError
from edgemoe_exporters.graph.metadata import MICROSOFT

if TYPE_CHECKING:
    from collections.abc import Mapping

    import onnx_ir as ir

Release: TypeAlias = "tuple[int, int]"

# Python 3.10 gets no newer one; older ones are not tried.
OLDEST: Release = (1, 23)


@dataclass(frozen=True, kw_only=True)
class OperatorRelease:
    """When onnxruntime got an operator.

    Attributes:
        release: The first that computes it right.
        inputs: Inputs that it has there at most.
        attributes: Names of its attributes there, apart by spaces.
        later: Attributes that it got afterwards, with the release.
    """

    release: Release = OLDEST
    inputs: int
    attributes: str
    later: Mapping[str, Release] = field(default_factory=dict)


OPERATORS: dict[str, OperatorRelease] = {
    "CausalConvWithState": OperatorRelease(
        release=(1, 25), inputs=4, attributes="activation ndim"
    ),
    "FusedMatMul": OperatorRelease(
        inputs=2, attributes="alpha transA transB transBatchA transBatchB"
    ),
    "GatherBlockQuantized": OperatorRelease(
        inputs=4, attributes="bits block_size gather_axis quantize_axis"
    ),
    "GroupQueryAttention": OperatorRelease(
        inputs=12,
        attributes="do_rotary kv_num_heads local_window_size num_heads qk_output "
        "rotary_interleaved scale smooth_softmax softcap",
    ),
    "LinearAttention": OperatorRelease(
        release=(1, 25),
        inputs=6,
        attributes="chunk_size kv_num_heads q_num_heads scale update_rule",
    ),
    "MatMulNBits": OperatorRelease(inputs=6, attributes="K N accuracy_level bits block_size"),
    # Before 1.28 both silently use another model's constants
    # (microsoft/onnxruntime-genai#2062, fixed by microsoft/onnxruntime#28467).
    "MoE": OperatorRelease(
        release=(1, 28),
        inputs=8,
        attributes="activation_alpha activation_beta activation_type k "
        "normalize_routing_weights swiglu_fusion swiglu_limit use_sparse_mixer",
    ),
    "QMoE": OperatorRelease(
        release=(1, 28),
        inputs=21,
        attributes="activation_alpha activation_beta activation_type block_size "
        "expert_weight_bits k normalize_routing_weights quant_type swiglu_fusion swiglu_limit "
        "use_sparse_mixer weights_prepacked",
        later={"accuracy_level": (1, 31)},
    ),
    "QuickGelu": OperatorRelease(inputs=1, attributes="alpha"),
    "RotaryEmbedding": OperatorRelease(
        inputs=4,
        attributes="interleaved is_packed_batching num_heads rotary_embedding_dim scale",
    ),
    "SkipSimplifiedLayerNormalization": OperatorRelease(inputs=4, attributes="epsilon"),
}

# The newest opset and IR version that a release loads.
_OPSETS: dict[int, Release] = {23: (1, 23), 25: (1, 24), 26: (1, 25), 28: (1, 32)}
_IR_VERSIONS: dict[int, Release] = {11: (1, 23), 13: (1, 24), 14: (1, 32)}


def needed_onnxruntime(model: ir.Model) -> str:
    """Find the oldest release of onnxruntime that computes a graph.

    Args:
        model: The lowered graph, of either flavour.

    Returns:
        Major and minor version, such as `1.31`.

    Raises:
        ExportError: The graph has what is not in the tables above.
    """
    nodes = [node for node in model.graph.all_nodes() if node.domain == MICROSOFT]
    found = max(
        _first("opset", model.opset_imports[""], _OPSETS),
        _first("IR version", model.ir_version, _IR_VERSIONS),
        *map(_of_node, nodes),
    )
    return ".".join(map(str, found))


def _first(what: str, version: int, newest: Mapping[int, Release]) -> Release:
    releases = [release for limit, release in newest.items() if version <= limit]
    if not releases:
        raise _unknown(f"{what} {version}")
    return min(releases)


def _of_node(node: ir.Node) -> Release:
    operator = OPERATORS.get(node.op_type)
    if operator is None or len(node.inputs) > operator.inputs:
        raise _unknown(f"{node.op_type} with {len(node.inputs)} inputs")
    release = operator.release
    for name in sorted(set(node.attributes) - set(operator.attributes.split())):
        if name not in operator.later:
            raise _unknown(f"{node.op_type} with {name}")
        release = max(release, operator.later[name])
    return release


def _unknown(what: str) -> ExportError:
    return ExportError(
        f"every part of a graph must have a known first release of onnxruntime, got {what}. "
        "This is a defect of the lowering: please report it."
    )
