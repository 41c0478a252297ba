"""Trace a model once, to an ONNX graph with opaque nodes that every flavour lowers.

The graph's inputs and outputs are those of a bundle; initializers have the names of the
checkpoint's tensors; nodes of the domain ``edgemoe`` are those of
:mod:`edgemoe_exporters.ops`.
"""

from __future__ import annotations

import logging
import warnings
from typing import TYPE_CHECKING, Any

import torch

from edgemoe.errors import ExportError
from edgemoe_exporters import schemas
from edgemoe_exporters.prepare import prepared
from edgemoe_exporters.tidy import tidy

if TYPE_CHECKING:
    import onnx_ir as ir

    from edgemoe.models.contract import MoeModel
    from edgemoe_exporters.prepare_attention import CachedLayer

OPSET = 20

# Metadata of initializers whose given axis counts the experts of a decoder layer.
EXPERT_AXIS = "edgemoe.expert_axis"
EXPERT_LAYER = "edgemoe.layer"

_PREFIX = "lm."


def trace(model: MoeModel) -> ir.Model:
    """Trace ``model`` with dynamic batch, sequence and past.

    Args:
        model: The model; it is as before when this returns.

    Returns:
        The graph. Initializers share the model's memory until they are written.

    Raises:
        ExportError: The model cannot be traced.
    """
    with prepared(model) as module, torch.no_grad():
        arguments = _example(model, module.cached)
        try:
            program = _export(module, arguments, len(module.cached))
        except torch.onnx.OnnxExporterError as error:
            raise ExportError(
                f"the {model.family} model cannot be traced: {error}. Run with --debug for the "
                "exporter's report."
            ) from error
    traced: ir.Model = program.model
    _rename_initializers(traced, model)
    tidy(traced)
    _mark_experts(traced, model)
    return traced


def _example(model: MoeModel, cached: tuple[CachedLayer, ...]) -> tuple[Any, ...]:
    """Return arguments with sizes that differ, so that no two dimensions look related."""
    batch, new, past = 2, 3, 4
    dtype = next(model.model.parameters()).dtype
    return (
        torch.ones(batch, new, dtype=torch.int64),
        torch.ones(batch, past + new, dtype=torch.int64),
        torch.arange(past, past + new).repeat(batch, 1),
        [
            (
                torch.zeros(batch, layer.heads, past, layer.key_size, dtype=dtype),
                torch.zeros(batch, layer.heads, past, layer.value_size, dtype=dtype),
            )
            for layer in cached
        ],
        torch.tensor([layer.top_k for layer in model.layers], dtype=torch.int64),
    )


def _export(module: torch.nn.Module, arguments: tuple[Any, ...], layers: int) -> Any:
    batch = torch.export.Dim("batch")
    new = torch.export.Dim("sequence")
    past = torch.export.Dim("past")
    total = torch.export.Dim("total")
    cached = {0: batch, 2: past}
    names = ("key", "value")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        return torch.onnx.export(
            module,
            arguments,
            dynamo=True,
            verbose=False,
            optimize=False,
            opset_version=OPSET,
            custom_translation_table=schemas.translations(),
            input_names=[
                "input_ids",
                "attention_mask",
                "position_ids",
                *(f"past_key_values.{i}.{name}" for i in range(layers) for name in names),
                "k_cap",
            ],
            output_names=[
                "logits",
                *(f"present.{i}.{name}" for i in range(layers) for name in names),
            ],
            dynamic_shapes=(
                {0: batch, 1: new},
                {0: batch, 1: total},
                {0: batch, 1: new},
                [(dict(cached), dict(cached)) for _ in range(layers)],
                None,
            ),
        )


def _rename_initializers(traced: ir.Model, model: MoeModel) -> None:
    """Give initializers the names of the checkpoint; a tied head is the embedding."""
    head = model.model.get_output_embeddings()
    embedding = model.model.get_input_embeddings()
    tied = head is not None and head.weight is embedding.weight
    names = {id(module): name for name, module in model.model.named_modules()}
    for initializer in list(traced.graph.initializers.values()):
        name = (initializer.name or "").removeprefix(_PREFIX)
        if tied and name == f"{names[id(head)]}.weight":
            name = f"{names[id(embedding)]}.weight"
        initializer.name = name


def _mark_experts(traced: ir.Model, model: MoeModel) -> None:
    """Say which initializers have experts along an axis, and of which decoder layer."""
    for layer in model.layers:
        for spec in layer.facts.tensors:
            value = traced.graph.initializers.get(f"{layer.name}.{spec.name}")
            if value is not None:
                value.metadata_props[EXPERT_AXIS] = str(spec.axis)
                value.metadata_props[EXPERT_LAYER] = str(layer.index)
