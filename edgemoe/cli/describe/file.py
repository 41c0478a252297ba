"""What any file of the pipeline is: its kind, sizes, shapes and provenance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgemoe.api.extras import needs
from edgemoe.cli.describe.checkpoint import describe_checkpoint
from edgemoe.cli.describe.report import REPORT_FILE, REPORT_FORMAT, describe_report
from edgemoe.disk import human_bytes
from edgemoe.errors import CheckpointError, EdgemoeError
from edgemoe.file_kinds import describe_mistake, identify
from edgemoe_runtime.bundle.names import MANIFEST_FILE
from edgemoe_runtime.input_files import parse_strict, read_file

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from edgemoe.k_policy import KPolicy
    from edgemoe.plans.plan import Plan

_MAX_JSON_BYTES = 256 << 20  # 256 MiB: no plan or key is near it


def describe(path: Path, *, full: bool = False) -> dict[str, Any]:
    """Tell what a path holds.

    Args:
        path: A checkpoint, bundle or report directory, or a statistics, plan or engine file.
        full: Whether to build the structure of a checkpoint's model.

    Returns:
        JSON values; `kind` comes first.

    Raises:
        EdgemoeError: It is none of these, or it is malformed.
    """
    if path.is_dir():
        if (path / MANIFEST_FILE).exists():
            return _describe_bundle(path)
        # What is an adapter alone is refused as such.
        if any((path / name).exists() for name in ("config.json", "adapter_config.json")):
            return describe_checkpoint(path, full=full)
        if (path / REPORT_FILE).exists():
            return describe_report(path)
        if any(path.glob("*.gguf")):
            return describe_checkpoint(path, full=full)
        raise CheckpointError(
            "a directory must be a checkpoint (config.json or a .gguf file), a bundle "
            f"({MANIFEST_FILE}) or a sweep's report ({REPORT_FILE}), got {path}, which has "
            "none of them."
        )
    kind = identify(path).name
    if kind == "missing":
        raise CheckpointError(f"the path must exist, got {path}.")
    if kind == "gguf":
        return describe_checkpoint(path, full=full)
    if kind == "statistics":
        return _describe_statistics(path)
    if kind == "engine":
        return _describe_engine(path.with_suffix(".json"))
    if kind not in ("plan", "report", "engine key", "json"):
        raise EdgemoeError(
            f"{path} must be a checkpoint, statistics, a plan, a bundle or an engine, got "
            f"{describe_mistake(path)}."
        )
    return _describe_json(path)


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


def _describe_policy(policy: KPolicy | None) -> dict[str, Any]:
    return {} if policy is None else {"k_policy": policy.describe()}


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
        "holds_texts": statistics.has_tokens,
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
        document = parse_strict(read_file(path))
    except (OSError, ValueError) as error:
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
        "holds_texts": plan.holds_texts,
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
