"""ONNX schemas of the ``edgemoe`` domain and how torch's exporter reaches them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnx.defs
import torch
from onnxscript.values import Opset

from edgemoe_exporters import ops

if TYPE_CHECKING:
    from collections.abc import Callable

VERSION = 1

_Parameter = onnx.defs.OpSchema.FormalParameter
_Attribute = onnx.defs.OpSchema.Attribute
_INT = onnx.defs.OpSchema.AttrType.INT
_FLOAT = onnx.defs.OpSchema.AttrType.FLOAT
_STRING = onnx.defs.OpSchema.AttrType.STRING
_FLOATS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
_OPTIONAL = onnx.defs.OpSchema.FormalParameterOption.Optional

# name -> (inputs, outputs, attributes); an input is (name, type), "?" marks it optional.
_OPS: dict[
    str,
    tuple[
        list[tuple[str, str]],
        list[tuple[str, str]],
        list[tuple[str, onnx.defs.OpSchema.AttrType]],
    ],
] = {
    "Route": (
        [
            ("hidden", "T"),
            ("weight", "T"),
            ("correction_bias?", "tensor(float)"),
            ("k_cap", "tensor(int64)"),
        ],
        [("weights", "T"), ("indices", "tensor(int64)")],
        [
            ("k_cap_index", _INT),
            ("top_k", _INT),
            ("scoring", _STRING),
            ("renormalise", _INT),
            ("scaling_factor", _FLOAT),
            ("n_group", _INT),
            ("topk_group", _INT),
            ("softmax_over", _STRING),
        ],
    ),
    "Experts": (
        [
            ("hidden", "T"),
            ("indices", "tensor(int64)"),
            ("weights", "T"),
            ("gate_up", "T"),
            ("down", "T"),
        ],
        [("output", "T")],
        [("activation", _STRING)],
    ),
    "Attention": (
        [
            ("query", "T"),
            ("key", "T"),
            ("value", "T"),
            ("past_key", "T"),
            ("past_value", "T"),
            ("attention_mask", "tensor(int64)"),
        ],
        [("output", "T"), ("present_key", "T"), ("present_value", "T")],
        [("scale", _FLOAT), ("sliding_window", _INT)],
    ),
    "RotaryEmbedding": (
        [("states", "T"), ("position_ids", "tensor(int64)"), ("inv_freq", "tensor(float)")],
        [("output", "T")],
        [("scaling", _FLOAT)],
    ),
    "RMSNorm": ([("states", "T"), ("weight", "T")], [("output", "T")], [("epsilon", _FLOAT)]),
}


def register() -> None:
    """Make onnx know the ops; doing it again changes nothing."""
    for name, (inputs, outputs, attributes) in _OPS.items():
        if onnx.defs.has(name, ops.DOMAIN):
            continue
        onnx.defs.register_schema(
            onnx.defs.OpSchema(
                name,
                ops.DOMAIN,
                VERSION,
                doc=f"Opaque {name} of a traced model; see edgemoe_exporters.ops.",
                inputs=[_formal(*parameter) for parameter in inputs],
                outputs=[_formal(*parameter) for parameter in outputs],
                type_constraints=[("T", _FLOATS, "Activations and weights.")],
                attributes=[_Attribute(key, kind, required=True) for key, kind in attributes],
            )
        )


def _formal(name: str, kind: str) -> onnx.defs.OpSchema.FormalParameter:
    if name.endswith("?"):
        return _Parameter(name[:-1], kind, param_option=_OPTIONAL)
    return _Parameter(name, kind)


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return what ``torch.onnx.export`` takes as ``custom_translation_table``."""
    register()
    opset: Any = Opset(ops.DOMAIN, VERSION)

    def route(
        hidden: Any,
        weight: Any,
        correction_bias: Any,
        k_cap: Any,
        k_cap_index: int,
        top_k: int,
        scoring: str,
        renormalise: bool,
        scaling_factor: float,
        n_group: int,
        topk_group: int,
        softmax_over: str,
    ) -> Any:
        return opset.Route(
            hidden,
            weight,
            correction_bias,
            k_cap,
            k_cap_index=k_cap_index,
            top_k=top_k,
            scoring=scoring,
            renormalise=int(renormalise),
            scaling_factor=scaling_factor,
            n_group=n_group,
            topk_group=topk_group,
            softmax_over=softmax_over,
        )

    def experts(
        hidden: Any, indices: Any, weights: Any, gate_up: Any, down: Any, activation: str
    ) -> Any:
        return opset.Experts(hidden, indices, weights, gate_up, down, activation=activation)

    def attention(
        query: Any,
        key: Any,
        value: Any,
        past_key: Any,
        past_value: Any,
        attention_mask: Any,
        scale: float,
        sliding_window: int,
    ) -> Any:
        return opset.Attention(
            query,
            key,
            value,
            past_key,
            past_value,
            attention_mask,
            scale=scale,
            sliding_window=sliding_window,
        )

    def rotary(states: Any, position_ids: Any, inv_freq: Any, scaling: float) -> Any:
        return opset.RotaryEmbedding(states, position_ids, inv_freq, scaling=scaling)

    def rms_norm(states: Any, weight: Any, epsilon: float) -> Any:
        return opset.RMSNorm(states, weight, epsilon=epsilon)

    return {
        torch.ops.edgemoe.route.default: route,
        torch.ops.edgemoe.experts.default: experts,
        torch.ops.edgemoe.attention.default: attention,
        torch.ops.edgemoe.rotary.default: rotary,
        torch.ops.edgemoe.rms_norm.default: rms_norm,
    }
