"""Rules that tie the parts of a manifest together; checked when one is read and written."""

from __future__ import annotations

import itertools
import re
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from edgemoe_runtime.bundle.names import (
    ENGINES_FOLDER,
    EXPERTS_USED,
    FLAVOURS,
    MANIFEST_FILE,
    PRECISIONS,
    RESERVED_TASK_NAME,
    TARGETS,
    TASK_NAME_RULE,
    graph_file,
    is_task_name,
)
from edgemoe_runtime.errors import ManifestError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgemoe_runtime.bundle.k_ladder import KRung
    from edgemoe_runtime.bundle.manifest import Manifest
    from edgemoe_runtime.bundle.task_entry import TaskEntry

_RELEASE = re.compile(r"[0-9]{1,4}\.[0-9]{1,4}")
_KV_FORMS = ("shared_buffer", "concat")
_CACHE_DTYPES = ("float32", "float16", "bfloat16")
_DTYPES = ("int64", "int32", "float32", "float16", "bfloat16")

_REMEDY = "Export the bundle again."


def check_manifest(manifest: Manifest) -> None:
    """Check a whole manifest.

    Raises:
        ManifestError: naming the first rule that is broken.
    """
    _check_names(manifest)
    _check_model(manifest)
    if not manifest.tasks:
        raise ManifestError(f"tasks must hold at least one task, got none. {_REMEDY}")
    for name, task in manifest.tasks.items():
        _check_task(manifest, name, task)
    _check_tensors(manifest)
    _check_ladders(manifest)
    for path in manifest.files:
        _check_relative_path(path)
    unknown = sorted(set(manifest.size.task_bytes) - set(manifest.tasks))
    _require(not unknown, "size.task_bytes must name tasks of the bundle", unknown)


def _check_relative_path(path: str) -> None:
    """Check that a file name of the manifest stays inside the bundle.

    Raises:
        ManifestError: when it is absolute, climbs, or names what may not be listed.
    """
    parts = PurePosixPath(path).parts
    plain = (
        path == "/".join(parts)
        and ".." not in parts
        and not path.startswith("/")
        and path not in ("", ".")
        and not any(character in path for character in "\\:\0\n\r")
    )
    _require(plain, "A file of the bundle must be a plain relative POSIX path", path)
    _require(
        path != MANIFEST_FILE and parts[0] != ENGINES_FOLDER,
        "files must list neither manifest.json nor engines (they are built on the device)",
        path,
    )


def _check_names(manifest: Manifest) -> None:
    for key, value, names in (
        ("target", manifest.target, TARGETS),
        ("flavour", manifest.flavour, FLAVOURS),
        ("precision", manifest.precision, PRECISIONS),
        ("kv_cache.form", manifest.kv_cache.form, _KV_FORMS),
        ("kv_cache.dtype", manifest.kv_cache.dtype, _CACHE_DTYPES),
        *(("kv_cache.states.dtype", s.dtype, _CACHE_DTYPES) for s in manifest.kv_cache.states),
    ):
        _require(value in names, f"{key} must be one of {', '.join(names)}", value)
    _require(
        _RELEASE.fullmatch(manifest.needs_onnxruntime) is not None,
        "needs_onnxruntime must be a release such as 1.31",
        manifest.needs_onnxruntime,
    )


def _check_model(manifest: Manifest) -> None:
    model = manifest.model
    layers = model.moe_layers
    _require(
        list(layers) == sorted(set(layers)) and all(i < model.num_layers for i in layers),
        f"model.moe_layers must ascend and be below num_layers {model.num_layers}",
        list(layers),
    )
    specials = [*model.eos_token_ids]
    if model.bos_token_id is not None:
        specials.append(model.bos_token_id)
    _require(
        all(token < model.vocab_size for token in specials),
        f"special tokens must be below vocab_size {model.vocab_size}",
        specials,
    )
    _require(
        len(manifest.kv_cache.layers) >= model.num_layers,
        f"kv_cache.layers must have at least one entry per decoder layer ({model.num_layers})",
        len(manifest.kv_cache.layers),
    )


def _check_task(manifest: Manifest, name: str, task: TaskEntry) -> None:
    _require(is_task_name(name), f"A task name must be {TASK_NAME_RULE}", name)
    _require(
        name != RESERVED_TASK_NAME, "A task name must not be that of the shared weights", name
    )
    _require(
        task.graph == graph_file(name),
        f"graph of task {name} must be {graph_file(name)}",
        task.graph,
    )
    _require(task.graph in manifest.files, "files must list every graph; missing", task.graph)
    counts = task.experts_per_layer
    _require(
        len(counts) == len(manifest.model.moe_layers),
        f"experts_per_layer of task {name} must have one count per MoE layer"
        f" ({len(manifest.model.moe_layers)})",
        len(counts),
    )
    # tokens may use fewer in some layers, which then need not have as many
    _require(
        max(counts, default=task.top_k) >= task.top_k,
        f"experts_per_layer of task {name} must be at least top_k {task.top_k} somewhere",
        list(counts),
    )
    if task.experts is not None:
        listed = tuple(len(layer) for layer in task.experts)
        _require(
            listed == counts, f"experts of task {name} must match {list(counts)}", list(listed)
        )


def _check_tensors(manifest: Manifest) -> None:
    cached = manifest.kv_cache.tensors(0)
    inputs = ["input_ids", "attention_mask", "position_ids"]
    inputs += [tensor.past for tensor in cached]
    if manifest.model.moe_layers:
        inputs.append("k_cap")
    outputs = ["logits", *(tensor.present for tensor in cached)]
    if any(spec.name == EXPERTS_USED for spec in manifest.outputs):
        # only bundles whose tokens choose their number of experts have it
        outputs.append(EXPERTS_USED)
    for label, specs, expected in (
        ("inputs", manifest.inputs, inputs),
        ("outputs", manifest.outputs, outputs),
    ):
        names = [spec.name for spec in specs]
        _require(len(set(names)) == len(names), f"{label} must have distinct names", names)
        different = sorted(set(names) ^ set(expected))
        _require(
            not different, f"{label} must be exactly those of the interface; differs", different
        )
        for spec in specs:
            _require(
                spec.dtype in _DTYPES,
                f"dtype of {spec.name} must be one of {', '.join(_DTYPES)}",
                spec.dtype,
            )
    _check_sizes(manifest)


def _check_sizes(manifest: Manifest) -> None:
    """Engines write into buffers of these sizes, so all that is said of them must agree."""
    specs = {spec.name: spec for spec in (*manifest.inputs, *manifest.outputs)}
    for name in ("input_ids", "attention_mask", "position_ids"):
        spec = specs[name]
        _require(
            spec.dtype == "int64" and len(spec.shape) == 2,
            f"{name} must be int64 with two dimensions",
            [spec.dtype, *spec.shape],
        )
    logits, vocabulary = specs["logits"], manifest.model.vocab_size
    _require(
        logits.dtype in ("float32", "float16", "bfloat16")
        and len(logits.shape) == 3
        and logits.shape[2] == vocabulary,
        f"logits must be floating and as wide as vocab_size {vocabulary}",
        [logits.dtype, *logits.shape],
    )
    for tensor in manifest.kv_cache.tensors(0):
        # At length 0 only that which is the length is 0.
        fixed = [size or None for size in tensor.shape]
        for name in (tensor.past, tensor.present):
            spec = specs[name]
            _require(
                spec.dtype == tensor.dtype
                and len(spec.shape) == len(fixed)
                and all(
                    size is None or size == given
                    for size, given in zip(fixed[1:], spec.shape[1:], strict=True)
                ),
                f"{name} must be as kv_cache says, {tensor.dtype} [batch, "
                f"{', '.join('length' if size is None else str(size) for size in fixed[1:])}]",
                [spec.dtype, *spec.shape],
            )
    if manifest.model.moe_layers:
        cap, layers = specs["k_cap"], len(manifest.model.moe_layers)
        _require(
            cap.dtype == "int64" and cap.shape == (layers,),
            f"k_cap must be int64 with one value per MoE layer ({layers})",
            [cap.dtype, *cap.shape],
        )
    used = specs.get(EXPERTS_USED)
    if used is not None:
        layers = len(manifest.model.moe_layers)
        _require(
            used.dtype == "int64" and used.shape == (layers,),
            f"{EXPERTS_USED} must be int64 with one value per MoE layer ({layers})",
            [used.dtype, *used.shape],
        )


def _check_ladders(manifest: Manifest) -> None:
    highest = max(task.top_k for task in manifest.tasks.values())
    _check_ladder(manifest, "k_ladder", manifest.k_ladder, highest)
    for name, task in manifest.tasks.items():
        table, layers = task.k_table, len(manifest.model.moe_layers)
        _require(
            table is None or (len(table) == layers and max(table) <= task.top_k),
            f"k_table of task {name} must have one value in [1, {task.top_k}] per MoE layer",
            table,
        )
        if task.k_ladder is not None:
            _check_ladder(manifest, f"k_ladder of task {name}", task.k_ladder, task.top_k)


def _check_ladder(
    manifest: Manifest, label: str, ladder: Sequence[KRung], highest: int
) -> None:
    names = [rung.name for rung in ladder]
    _require(len(set(names)) == len(names), f"{label} must have distinct names", names)
    for rung in ladder:
        _require(
            len(rung.k_cap) == len(manifest.model.moe_layers)
            and all(1 <= cap <= highest for cap in rung.k_cap),
            f"k_cap of rung {rung.name} must have one value in [1, {highest}] per MoE layer",
            list(rung.k_cap),
        )
    costs = [rung.cost.decode for rung in ladder if rung.cost is not None]
    falling = all(before > after for before, after in itertools.pairwise(costs))
    _require(
        not costs or (len(costs) == len(ladder) and costs[0] == 1 and falling),
        f"{label} must have a cost on every rung or on none, from 1 on falling",
        costs,
    )


def _require(holds: bool, rule: str, value: object) -> None:
    if not holds:
        raise ManifestError(f"{rule}, got {value!r}. {_REMEDY}")
