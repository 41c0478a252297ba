"""Describe a model and its written graphs for the manifest of a bundle."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgemoe.errors import ExportError
from edgemoe.plans.keep_all import KEEP_ALL
from edgemoe.versions import __version__
from edgemoe_runtime.bundle.cache_spec import CacheState, KvCache, KvLayer
from edgemoe_runtime.bundle.graph_spec import ModelInfo

if TYPE_CHECKING:
    import onnx_ir as ir

    from edgemoe.models.contract import MoeModel
    from edgemoe.plans.plan import Plan
    from edgemoe_runtime.bundle.graph_spec import TensorSpec
    from edgemoe_runtime.json_fields import Json

_PAST = "past_key_values."
CREATED_BY = f"edgemoe {__version__}"


def describe_model(model: MoeModel, name: str, ends: tuple[int, ...]) -> ModelInfo:
    """Describe the language model.

    Args:
        model: The whole model.
        name: Name shown to people.
        ends: Tokens that end a text.

    Returns:
        Its entry in the manifest.
    """
    config: Any = model.config
    vocabulary = int(config.vocab_size)
    bos = config.bos_token_id
    return ModelInfo(
        family=model.family,
        name=name,
        vocab_size=vocabulary,
        hidden_size=int(config.hidden_size),
        num_layers=int(config.num_hidden_layers),
        max_position_embeddings=int(config.max_position_embeddings),
        bos_token_id=bos if isinstance(bos, int) and 0 <= bos < vocabulary else None,
        eos_token_ids=ends,
        moe_layers=tuple(layer.index for layer in model.layers),
        checkpoint_sha256=model.sha256,
    )


def describe_cache(graph: ir.Graph, inputs: tuple[TensorSpec, ...], num_layers: int) -> KvCache:
    """Describe the cache of a lowered graph.

    Args:
        graph: The graph.
        inputs: Its inputs.
        num_layers: Decoder layers of the model.

    Returns:
        Its entry in the manifest.

    Raises:
        ExportError: Keys and values are no pairs of one type.
    """
    cached = {
        spec.name.removeprefix(_PAST): spec for spec in inputs if spec.name.startswith(_PAST)
    }
    keys = {name.partition(".")[0] for name in cached if name.endswith(".key")}
    values = {name.partition(".")[0] for name in cached if name.endswith(".value")}
    pairs = {name for name in cached if name.endswith((".key", ".value"))}
    dtypes = {cached[name].dtype for name in pairs}
    if keys != values or len(dtypes) > 1:
        raise ExportError(
            f"a graph's cache must be pairs of key and value of one type, got {len(keys)} "
            f"keys, {len(values)} values, types {sorted(dtypes)}: a defect of the lowering."
        )
    # Layers that run several times for a token keep something each time.
    times = max([num_layers, *(int(name.partition(".")[0]) + 1 for name in cached)])
    layers: list[KvLayer | None] = []
    for index in map(str, range(times)):
        if index not in keys:
            layers.append(None)
            continue
        key, value = cached[f"{index}.key"], cached[f"{index}.value"]
        layers.append(
            KvLayer(heads=_size(key, 1), key_dim=_size(key, 3), value_dim=_size(value, 3))
        )
    shared = any(node.op_type == "GroupQueryAttention" for node in graph)
    return KvCache(
        form="shared_buffer" if shared else "concat",
        dtype=dtypes.pop() if dtypes else "float32",
        layers=tuple(layers),
        states=tuple(
            CacheState(
                name=name,
                dtype=spec.dtype,
                shape=tuple(size if isinstance(size, int) else None for size in spec.shape[1:]),
            )
            for name, spec in cached.items()
            if name not in pairs
        ),
    )


def describe_plan(plan: Plan, model: MoeModel) -> dict[str, Json] | None:
    """Describe where a task's experts come from.

    Args:
        plan: The task's plan.
        model: The whole model.

    Returns:
        Its provenance as JSON values, that of a checkpoint which was compressed before under
        `before`; of a plan that keeps all the checkpoint's only, or None.
    """
    before: Any = None if model.provenance is None else dict(model.provenance)
    if plan.method == KEEP_ALL and plan.factors is None:
        return None if before is None else {"method": KEEP_ALL, "before": before}
    return {
        "method": plan.method,
        "options": dict(sorted(plan.options.items())),
        "seed": plan.seed,
        "task": plan.task,
        "sha256": plan.sha256,
        "checkpoint_sha256": plan.checkpoint_sha256,
        "statistics_sha256": plan.statistics_sha256,
        "edgemoe_version": plan.edgemoe_version,
        "calibration_lines": plan.calibration_lines,
        **({} if plan.factors is None else {"factors": plan.factors.describe()}),
        "before": before,
    }


def _size(spec: TensorSpec, axis: int) -> int:
    size = spec.shape[axis]
    if not isinstance(size, int):
        raise ExportError(
            f"{spec.name} must have a fixed size on axis {axis}, got {size!r}. This is a "
            "defect of the lowering: please report it."
        )
    return size
