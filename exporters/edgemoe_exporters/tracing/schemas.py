"""ONNX schemas of the `edgemoe` domain and how torch's exporter reaches them."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import onnx.defs
import torch
from onnxscript.values import Opset

from edgemoe.errors import ExportError
from edgemoe_exporters.graph.metadata import DOMAIN

if TYPE_CHECKING:
    from collections.abc import Callable

VERSION = 1

_Parameter = onnx.defs.OpSchema.FormalParameter
_Attribute = onnx.defs.OpSchema.Attribute
_INT = onnx.defs.OpSchema.AttrType.INT
_FLOAT = onnx.defs.OpSchema.AttrType.FLOAT
_STRING = onnx.defs.OpSchema.AttrType.STRING
_FLOATS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
_PYTHON: dict[onnx.defs.OpSchema.AttrType, type] = {_INT: int, _FLOAT: float, _STRING: str}
_BY_NAME = inspect.Parameter.POSITIONAL_OR_KEYWORD
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
            ("logit_bias?", "T"),
            ("correction_bias?", "T"),
            ("expert_scale?", "T"),
            ("chosen?", "tensor(int64)"),
            ("k_cap", "tensor(int64)"),
        ],
        [("weights", "T"), ("indices", "tensor(int64)")],
        [
            ("k_cap_index", _INT),
            ("top_k", _INT),
            ("scoring", _STRING),
            ("softmax_over", _STRING),
            ("renormalise", _INT),
            ("sum_epsilon", _FLOAT),
            ("scaling_factor", _FLOAT),
            ("bias_on", _STRING),
            ("n_group", _INT),
            ("topk_group", _INT),
            ("group_score", _STRING),
            ("group_fill", _FLOAT),
            ("jitter", _FLOAT),
            ("idle", _INT),
            ("shared", _INT),
        ],
    ),
    "SharedGates": (
        [("hidden", "T"), ("weight", "T"), ("weights", "T")],
        [("gates", "T")],
        [("count", _INT), ("scale", _FLOAT)],
    ),
    "Experts": (
        [
            ("hidden", "T"),
            ("indices", "tensor(int64)"),
            ("weights", "T"),
            ("gate_up", "T"),
            ("down", "T"),
            ("gate_up_bias?", "T"),
            ("down_bias?", "T"),
        ],
        [("output", "T")],
        [
            ("is_transposed", _INT),
            ("is_concatenated", _INT),
            ("activation", _STRING),
            ("gated", _INT),
            ("alpha", _FLOAT),
            ("beta", _FLOAT),
            ("limit", _FLOAT),
            ("gate_softcap", _FLOAT),
            ("up_softcap", _FLOAT),
        ],
    ),
    "FactoredExperts": (
        [
            ("hidden", "T"),
            ("indices", "tensor(int64)"),
            ("weights", "T"),
            ("up_in", "T"),
            ("up_out", "T"),
            ("down_in", "T"),
            ("down_out", "T"),
            ("up_bias?", "T"),
            ("down_bias?", "T"),
        ],
        [("output", "T")],
        [
            ("is_concatenated", _INT),
            ("activation", _STRING),
            ("gated", _INT),
            ("alpha", _FLOAT),
            ("beta", _FLOAT),
            ("limit", _FLOAT),
            ("gate_softcap", _FLOAT),
            ("up_softcap", _FLOAT),
        ],
    ),
    "Attention": (
        [
            ("query", "T"),
            ("key", "T"),
            ("value", "T"),
            ("past_key", "T"),
            ("past_value", "T"),
            ("attention_mask", "tensor(int64)"),
            ("sinks?", "T"),
        ],
        [("output", "T"), ("present_key", "T"), ("present_value", "T")],
        [("scale", _FLOAT), ("sliding_window", _INT)],
    ),
    "AttendAll": (
        [
            ("query", "T"),
            ("key", "T"),
            ("value", "T"),
            ("attention_mask", "tensor(int64)"),
            ("sinks?", "T"),
            ("selected?", "T"),
            ("bias?", "T"),
        ],
        [("output", "T")],
        [("scale", _FLOAT), ("sliding_window", _INT)],
    ),
    "SelectKeys": (
        [("scores", "T"), ("attention_mask", "tensor(int64)")],
        [("selected", "T")],
        [("count", _INT)],
    ),
    "SelectBlocks": (
        [("scores", "T"), ("attention_mask", "tensor(int64)")],
        [("selected", "T")],
        [("block_size", _INT), ("count", _INT), ("local", _INT)],
    ),
    "PoolWindows": (
        [("states", "T"), ("bias", "T")],
        [("entries", "T")],
        [("overlaps", _INT)],
    ),
    "NewMask": (
        [("attention_mask", "tensor(int64)"), ("states", "T")],
        [("mask", "T")],
        [],
    ),
    "Softplus": ([("states", "T")], [("output", "T")], []),
    "CausalConv": (
        [("states", "T"), ("past", "S"), ("weight", "T"), ("bias?", "T")],
        [("output", "T"), ("present", "S")],
        [("activation", _STRING)],
    ),
    "JoinPositions": (
        [("states", "T"), ("past", "S")],
        [("joined", "T"), ("present", "S")],
        [],
    ),
    "LinearAttention": (
        [
            ("query", "T"),
            ("key", "T"),
            ("value", "T"),
            ("decay", "T"),
            ("beta?", "T"),
            ("past", "S"),
        ],
        [("output", "T"), ("present", "S")],
        [("scale", _FLOAT)],
    ),
    "RotaryEmbedding": (
        [("states", "T"), ("position_ids", "tensor(int64)"), ("inv_freq", "tensor(float)")],
        [("output", "T")],
        [("scaling", _FLOAT)],
    ),
    "Angles": (
        [("position_ids", "tensor(int64)"), ("inv_freq", "tensor(float)")],
        [("cos", "tensor(float)"), ("sin", "tensor(float)")],
        [("scaling", _FLOAT), ("layout", _STRING)],
    ),
    "RMSNorm": (
        [("states", "T"), ("weight?", "T")],
        [("output", "T")],
        [("epsilon", _FLOAT), ("offset", _FLOAT)],
    ),
}

# The torch op of each.
_TORCH_NAMES = {
    "Route": "route",
    "SharedGates": "shared_gates",
    "Experts": "experts",
    "FactoredExperts": "factored_experts",
    "Attention": "attention",
    "AttendAll": "attend_all",
    "SelectKeys": "select_keys",
    "SelectBlocks": "select_blocks",
    "PoolWindows": "pool_windows",
    "NewMask": "new_mask",
    "CausalConv": "causal_conv",
    "JoinPositions": "join_positions",
    "LinearAttention": "linear_attention",
    "RotaryEmbedding": "rotary",
    "Angles": "angles",
    "RMSNorm": "rms_norm",
}


def register() -> None:
    """Register the ops' schemas with onnx; idempotent."""
    for name, (inputs, outputs, attributes) in _OPS.items():
        if onnx.defs.has(name, DOMAIN):
            continue
        onnx.defs.register_schema(
            onnx.defs.OpSchema(
                name,
                DOMAIN,
                VERSION,
                doc=f"Custom op {name} of a traced model; see edgemoe_exporters.tracing.ops.",
                inputs=[_formal(*parameter) for parameter in inputs],
                outputs=[_formal(*parameter) for parameter in outputs],
                type_constraints=[
                    ("T", _FLOATS, "Activations and weights."),
                    *([("S", _FLOATS, "State.")] if any(k == "S" for _, k in inputs) else []),
                ],
                attributes=[_Attribute(key, kind, required=True) for key, kind in attributes],
            )
        )


def _formal(name: str, kind: str) -> onnx.defs.OpSchema.FormalParameter:
    if name.endswith("?"):
        return _Parameter(name[:-1], kind, param_option=_OPTIONAL)
    return _Parameter(name, kind)


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return the `custom_translation_table` of `torch.onnx.export`.

    Every torch op has the inputs of its ONNX op, then its attributes, in the same order.
    """
    register()
    opset: Any = Opset(DOMAIN, VERSION)

    # The exporter's own form has a threshold and a scale, and is float16 where the graph is.
    def softplus(states: Any, beta: float = 1.0, threshold: float = 20.0) -> Any:
        if beta != 1.0:
            raise ExportError(f"softplus must have a beta of 1 in a graph, got {beta}.")
        return opset.Softplus(states)

    return {
        torch.ops.aten.softplus.default: softplus,
        **{
            getattr(torch.ops.edgemoe, torch_name).default: _translation(opset, name)
            for name, torch_name in _TORCH_NAMES.items()
        },
    }


def _translation(opset: Any, name: str) -> Callable[..., Any]:
    inputs, _, attributes = _OPS[name]
    # The exporter reads the parameters' kinds from annotations: tensors have none.
    parameters = [inspect.Parameter(part.rstrip("?"), _BY_NAME) for part, _ in inputs]
    parameters += [
        inspect.Parameter(key, _BY_NAME, annotation=_PYTHON[kind]) for key, kind in attributes
    ]
    signature = inspect.Signature(parameters)

    def translate(*arguments: Any, **options: Any) -> Any:
        given = signature.bind(*arguments, **options).arguments
        tensors = [given[part.rstrip("?")] for part, _ in inputs]
        values = {key: given[key] for key, _ in attributes}
        values = {k: int(v) if isinstance(v, bool) else v for k, v in values.items()}
        return getattr(opset, name)(*tensors, **values)

    translate.__signature__ = signature  # type: ignore[attr-defined]
    translate.__annotations__ = {key: _PYTHON[kind] for key, kind in attributes}
    translate.__name__ = _TORCH_NAMES[name]
    return translate
