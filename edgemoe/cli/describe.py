"""What any file of the pipeline is: its kind, sizes, shapes and provenance."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from edgemoe.api.extras import needs
from edgemoe.cli.describe_report import REPORT_FILE, REPORT_FORMAT, describe_report
from edgemoe.cli.options import human_bytes
from edgemoe.errors import CheckpointError, EdgemoeError
from edgemoe_runtime.bundle.names import MANIFEST_FILE

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from edgemoe.k_policy import KPolicy
    from edgemoe.models.ragged import RaggedNote
    from edgemoe.plans.plan import Plan

_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
_MAX_JSON_BYTES = 256 << 20  # 256 MiB: no plan or key is near it


def describe(path: Path) -> dict[str, Any]:
    """Tell what a path holds.

    Args:
        path: A checkpoint, bundle or report directory, or a statistics, plan or engine file.

    Returns:
        JSON values; `kind` comes first.

    Raises:
        EdgemoeError: It is none of these, or it is malformed.
    """
    if path.is_dir():
        if (path / MANIFEST_FILE).exists():
            return _describe_bundle(path)
        if (path / "config.json").exists():
            return _describe_checkpoint(path)
        if (path / REPORT_FILE).exists():
            return describe_report(path)
        raise CheckpointError(
            f"a directory must be a checkpoint (config.json), a bundle ({MANIFEST_FILE}) or a "
            f"sweep's report ({REPORT_FILE}), got {path}, which has none of them."
        )
    if not path.exists():
        raise CheckpointError(f"the path must exist, got {path}.")
    if _is_safetensors(path):
        return _describe_statistics(path)
    if path.suffix == ".engine":
        return _describe_engine(path.with_suffix(".json"))
    return _describe_json(path)


def _is_safetensors(path: Path) -> bool:
    """Tell by the first bytes, a header's length and its brace: any name will do."""
    with path.open("rb") as opened:
        head = opened.read(9)
    return path.suffix == ".safetensors" or (head[7:] == b"\0{")


def _describe_bundle(path: Path) -> dict[str, Any]:
    from edgemoe_runtime.bundle.manifest_file import load_manifest
    from edgemoe_runtime.bundle.names import ENGINES_FOLDER

    manifest = load_manifest(path)
    document: dict[str, Any] = manifest.to_json()
    engines = {key.name: _describe_engine(key) for key in path.glob(f"{ENGINES_FOLDER}/*.json")}
    return {
        "kind": "bundle",
        "path": str(path),
        "created_by": manifest.created_by,
        "target": manifest.target,
        "flavour": manifest.flavour,
        "precision": manifest.precision,
        "needs_onnxruntime": manifest.needs_onnxruntime,
        "model": document["model"],
        "size": document["size"],
        "tasks": document["tasks"],
        "kv_cache": {
            "form": manifest.kv_cache.form,
            "dtype": manifest.kv_cache.dtype,
            "layers": len(manifest.kv_cache.layers),
            "states": len(manifest.kv_cache.states),
        },
        "k_ladder": document["k_ladder"],
        "inputs": document["inputs"],
        "outputs": document["outputs"],
        "engines": engines,
        "files": document["files"],
    }


def _describe_checkpoint(path: Path) -> dict[str, Any]:
    needs("export")
    from edgemoe.models.checkpoint import Checkpoint
    from edgemoe.models.safety import read_json_object

    checkpoint = Checkpoint(path)
    config = read_json_object(path / "config.json", checkpoint.read("config.json"))
    family = config.get("model_type")
    tensors = [item for file in checkpoint.weights for item in _read_tensors(file)]
    facts: dict[str, Any] = {
        "kind": "dense checkpoint",
        "path": str(path),
        "family": family,
        "parameters": sum(math.prod(shape) for _, shape in tensors),
        "dtypes": sorted({dtype for dtype, _ in tensors}),
        "weight_bytes": sum(file.stat().st_size for file in checkpoint.weights),
        "layers": config.get("num_hidden_layers"),
        "hidden_size": config.get("hidden_size"),
        "vocab_size": config.get("vocab_size"),
    }
    if not checkpoint.has_experts:
        if any(config.get(name) for name in _EXPERT_COUNTS):
            facts["kind"] = "MoE checkpoint of a family that is not supported"
        return facts
    shape, note = checkpoint.shape, checkpoint.note
    ranks = (None if note is None else note.ranks_per_layer) or ()
    embedded = config.get("edgemoe") or {}
    return {
        **facts,
        "kind": "MoE checkpoint" if note is None else "ragged MoE checkpoint",
        "moe_layers": [layer.layer for layer in shape.layers],
        "experts_per_layer": list(shape.experts_per_layer),
        "top_k": [layer.top_k for layer in shape.layers],
        "expert_intermediate_size": shape.intermediate_size,
        **_describe_widths(shape.widths_per_layer),
        **_describe_ranks([None if pair is None else (pair.up, pair.down) for pair in ranks]),
        **_describe_bases(note),
        **_describe_policy(checkpoint.k_policy),
        "provenance": embedded.get("provenance") if note is None else note.provenance,
    }


def _describe_widths(widths: Sequence[int]) -> dict[str, Any]:
    """Name the widths of layers, where they differ."""
    return {} if len(set(widths)) == 1 else {"widths_per_layer": list(widths)}


def _describe_bases(note: RaggedNote | None) -> dict[str, Any]:
    if note is None or note.basis_per_layer is None:
        return {}
    return {"basis_per_layer": list(note.basis_per_layer)}


def _describe_policy(policy: KPolicy | None) -> dict[str, Any]:
    return {} if policy is None else {"k_policy": policy.describe()}


def _read_tensors(file: Path) -> list[tuple[str, list[int]]]:
    """Read dtype and shape of every tensor from the header of a safetensors file."""
    with file.open("rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    return [
        (entry["dtype"], entry["shape"])
        for name, entry in header.items()
        if name != "__metadata__"
    ]


def _describe_statistics(path: Path) -> dict[str, Any]:
    needs("export")
    from edgemoe.calibrate.statistics import Statistics

    statistics = Statistics.load(path)
    return {
        "kind": "statistics",
        "path": str(path),
        "sha256": statistics.sha256,
        "checkpoint_sha256": statistics.checkpoint_sha256,
        "family": statistics.shape.family,
        "moe_layers": [layer.layer for layer in statistics.shape.layers],
        "experts_per_layer": list(statistics.shape.experts_per_layer),
        "tasks": {
            name: {
                "tokens": task.tokens,
                "passes": len(task.sources),
                "files_sha256": sorted({source.sha256 for source in task.sources}),
            }
            for name, task in statistics.tasks.items()
        },
    }


def _describe_json(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise EdgemoeError(
            f"{path} must be a file of edgemoe, got {human_bytes(path.stat().st_size)}."
        )
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise EdgemoeError(
            f"{path} must be a checkpoint, statistics, a plan, a bundle or an engine, got "
            "something else."
        ) from error
    kind = document.get("format") if isinstance(document, dict) else None
    if kind == "edgemoe.engine":
        return _describe_engine(path)
    if kind == REPORT_FORMAT and path.name == REPORT_FILE:
        return describe_report(path.parent)
    if kind == "edgemoe.plan":
        return _describe_plan(path)
    raise EdgemoeError(f"{path} must be a file that edgemoe wrote, got JSON of another kind.")


def _describe_plan(path: Path) -> dict[str, Any]:
    from edgemoe.plans.plan import Plan

    plan = Plan.load(path)
    return {
        "kind": "plan",
        "path": str(path),
        "sha256": plan.sha256,
        "method": plan.method,
        "task": plan.task,
        "seed": plan.seed,
        "options": dict(plan.options),
        "layers": [layer.layer for layer in plan.layers],
        "experts_per_layer": list(plan.experts_per_layer),
        "merged_experts": sum(
            len(expert.members) > 1 for layer in plan.layers for expert in layer.experts
        ),
        **_describe_neurons(plan),
        **_describe_ranks(plan.ranks_per_layer),
        **({} if plan.factors is None else {"factors": plan.factors.describe()}),
        **_describe_policy(plan.k_policy),
        "checkpoint_sha256": plan.checkpoint_sha256,
        "statistics_sha256": plan.statistics_sha256,
        "edgemoe_version": plan.edgemoe_version,
    }


def _describe_neurons(plan: Plan) -> dict[str, Any]:
    """Count the neurons that each layer's experts keep; None stands for all."""
    from edgemoe.plans.channels import count_mask

    if not plan.prunes_width:
        return {}
    counts = [
        {None if e.neurons is None else count_mask(e.neurons) for e in layer.experts}
        for layer in plan.layers
    ]
    most = [None if None in found else max(n for n in found if n) for found in counts]
    return {"most_neurons_per_layer": most}


def _describe_ranks(ranks: Sequence[tuple[int, int] | None]) -> dict[str, Any]:
    """Name the ranks that layers are stored with, where any is factored."""
    if all(pair is None for pair in ranks):
        return {}
    return {
        "up_ranks": [None if pair is None else pair[0] for pair in ranks],
        "down_ranks": [None if pair is None else pair[1] for pair in ranks],
    }


def _describe_engine(key_path: Path) -> dict[str, Any]:
    from edgemoe_runtime.bundle.engine_cache import EngineKey

    key = EngineKey.load(key_path)
    engine = key_path.with_name(key.file_name)
    return {
        "kind": "engine",
        "path": str(engine),
        "present": engine.is_file(),
        **{name: value for name, value in key.to_json().items() if name != "format"},
    }
