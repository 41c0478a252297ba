"""The JSON header of a statistics file: every key known, every value in range."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgemoe.errors import StatisticsError
from edgemoe.models.shapes import LayerShape, ModelShape
from edgemoe_runtime.errors import ManifestError
from edgemoe_runtime.json_fields import Value

if TYPE_CHECKING:
    from edgemoe_runtime.json_fields import Json

_FIELDS = ("format", "version", "created_by", "checkpoint_sha256", "shape", "tasks")
_SOURCE = ("sha256", "lines", "tokens", "shard", "sequence_length", "max_tokens")
_LAYER = ("layer", "num_experts", "top_k", "n_group", "min_group_size")
_WIDTH = "intermediate_size"


def read_header(header: Json, place: str) -> tuple[str, ModelShape, dict[str, list[Any]]]:
    """Read what a header says.

    Args:
        header: The JSON value, of a version that is ours.
        place: Where it is, for messages.

    Returns:
        Fingerprint of the checkpoint, its shape, and for each task the arguments of its
        passes (`edgemoe.calibrate.task_statistics.Source`), but the sample.

    Raises:
        StatisticsError: A value is missing, unknown, of another type or out of range.
    """
    try:
        fields = Value(header, place, "Calibrate again.").fields(*_FIELDS)
        tasks = {
            name: [_read_source(entry) for entry in entries.items()]
            for name, entries in fields["tasks"].mapping().items()
        }
        return fields["checkpoint_sha256"].text(), _read_shape(fields["shape"]), tasks
    except ManifestError as error:
        raise StatisticsError(str(error)) from error


def _read_shape(value: Value) -> ModelShape:
    fields = value.fields("family", "layers", "hidden_size", _WIDTH)
    layers = [_read_layer(layer) for layer in fields["layers"].items()]
    indices = [layer.layer for layer in layers]
    if indices != sorted(set(indices)):
        fields["layers"].refuse("name each decoder layer once, in their order")
    return ModelShape(
        family=fields["family"].text(),
        layers=tuple(layers),
        hidden_size=fields["hidden_size"].integer(1),
        intermediate_size=fields[_WIDTH].integer(1),
    )


def _read_layer(value: Value) -> LayerShape:
    names = (*_LAYER, _WIDTH) if _WIDTH in value.mapping() else _LAYER
    fields = value.fields(*names)
    layer = LayerShape(
        layer=fields["layer"].integer(0),
        num_experts=fields["num_experts"].integer(1),
        top_k=fields["top_k"].integer(1),
        n_group=fields["n_group"].integer(1),
        min_group_size=fields["min_group_size"].integer(1),
        intermediate_size=fields[_WIDTH].integer(1) if _WIDTH in names else None,
    )
    if layer.top_k > layer.num_experts:
        fields["top_k"].refuse(f"be at most the {layer.num_experts} experts of its layer")
    return layer


def _read_source(value: Value) -> dict[str, Any]:
    fields = value.fields(*_SOURCE)
    shard = fields["shard"].integers(0)
    if len(shard) != 2 or not shard[0] < shard[1]:
        fields["shard"].refuse("be an index and a number of shards above it")
    return {
        "sha256": fields["sha256"].text(),
        "lines": fields["lines"].integer(0),
        "tokens": fields["tokens"].integer(0),
        "shard": (shard[0], shard[1]),
        "sequence_length": fields["sequence_length"].integer(1),
        "max_tokens": fields["max_tokens"].optional(lambda most: most.integer(1)),
    }
