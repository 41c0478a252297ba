"""Trace a model once, to an ONNX graph with custom ops that every flavour lowers.

The graph's inputs and outputs are those of a bundle; initializers have the names of the
checkpoint's tensors; nodes of the domain `edgemoe` are those of
`tracing.ops`.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from typing import TYPE_CHECKING, Any, cast

import torch

from edgemoe.errors import ExportError
from edgemoe_exporters.graph.metadata import mark_experts
from edgemoe_exporters.tracing import schemas
from edgemoe_exporters.tracing.prepare.model import prepared
from edgemoe_exporters.tracing.tidy import tidy

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx_ir as ir

    from edgemoe.models.contract import MoeModel
    from edgemoe_exporters.tracing.cache import CacheTensor

OPSET = 20

_PREFIX = "lm."


def trace(model: MoeModel) -> ir.Model:
    """Trace `model` with dynamic batch, sequence and past.

    Args:
        model: The model, in memory or on the meta device; it is as before when this returns.

    Returns:
        The graph. Initializers share the model's memory until they are written; those of a
        model on the meta device must be given a content.

    Raises:
        ExportError: The model cannot be traced.
    """
    with _on_one_device(model.model), prepared(model) as module, torch.no_grad():
        arguments = _example(model, module.cached, module.longest_window)
        try:
            program = _export(module, arguments, module.cached)
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


@contextlib.contextmanager
def _on_one_device(model: torch.nn.Module) -> Iterator[None]:
    """Move tensors with memory, such as angles, to the meta device if the weights are there."""
    moved: list[tuple[dict[str, Any], str, torch.Tensor]] = []
    try:
        if any(parameter.is_meta for parameter in model.parameters()):
            for module in model.modules():
                table: dict[str, Any]
                for table in cast("Any", (module._parameters, module._buffers)):
                    for name, tensor in table.items():
                        if tensor is not None and not tensor.is_meta:
                            moved.append((table, name, tensor))
        for table, name, tensor in moved:
            empty = torch.empty_like(tensor, device="meta")
            is_parameter = isinstance(tensor, torch.nn.Parameter)
            table[name] = torch.nn.Parameter(empty, False) if is_parameter else empty
        yield
    finally:
        for table, name, tensor in moved:
            table[name] = tensor


def _example(model: MoeModel, cached: tuple[CacheTensor, ...], window: int) -> tuple[Any, ...]:
    """Return arguments with sizes that differ, so that no two dimensions look related.

    Windows are several, since torch takes no, or one, of something for a number that stays.
    """
    batch, new, past = 2, 3, 4 + 5 * window
    first = next(model.model.parameters())
    with torch.device(first.device):
        return (
            torch.ones(batch, new, dtype=torch.int64),
            torch.ones(batch, past + new, dtype=torch.int64),
            torch.arange(past, past + new).repeat(batch, 1),
            [tensor.zeros(batch, past, first.dtype) for tensor in cached],
            torch.tensor([layer.top_k for layer in model.layers], dtype=torch.int64),
        )


def _export(
    module: torch.nn.Module, arguments: tuple[Any, ...], cached: tuple[CacheTensor, ...]
) -> Any:
    batch = torch.export.Dim("batch")
    new = torch.export.Dim("sequence")
    past = torch.export.Dim("past")
    total = torch.export.Dim("total")
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
                *(f"past_key_values.{tensor.name}" for tensor in cached),
                "k_cap",
            ],
            output_names=[
                "logits",
                *(f"present.{tensor.name}" for tensor in cached),
            ],
            dynamic_shapes=(
                {0: batch, 1: new},
                {0: batch, 1: total},
                {0: batch, 1: new},
                [_dynamic_axes(tensor, batch, past) for tensor in cached],
                None,
            ),
        )


def _dynamic_axes(tensor: CacheTensor, batch: Any, past: Any) -> dict[int, Any]:
    lengths = (axis for axis, size in enumerate(tensor.shape, start=1) if size is None)
    return {0: batch, **dict.fromkeys(lengths, past)}


def _rename_initializers(traced: ir.Model, model: MoeModel) -> None:
    """Name initializers as in the checkpoint; a tied head is the embedding."""
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
    """Mark the initializers that have experts along an axis, and nothing else, by layer."""
    for layer in model.layers:
        for spec in layer.spec.tensors:
            value = traced.graph.initializers.get(f"{layer.name}.{spec.name}")
            if value is not None and not spec.tail and not spec.holds_ids:
                mark_experts(value, spec.axis, layer.index)
