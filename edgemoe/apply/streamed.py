"""Carry out a plan on a checkpoint that is larger than memory, one decoder layer at a time.

Only the tensors that the plan changes are read as tensors, in the type that they are stored in;
all others are copied as bytes. Where the plan has ranks, all layers are factored first, in
float32, and their factors kept until they are written. The result loads to the same tensors as
`edgemoe.apply.in_memory.apply_plan` gives.
"""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.core_model_loading import dot_natural_key

from edgemoe.apply.checks import check_ranks, check_width_pruning, refuse_k_policy
from edgemoe.apply.expert_tensors import apply_layer, keeps_all
from edgemoe.apply.factor_streamed import factor_streamed
from edgemoe.apply.provenance import describe_plan
from edgemoe.decompose.registry import find_method
from edgemoe.disk import require_space
from edgemoe.layerwise.finished_layers import read_state
from edgemoe.models.checkpoint import Checkpoint
from edgemoe.models.k_policy import save_k_policy
from edgemoe.models.layers.factored import empty_factors
from edgemoe.models.layers.shared_basis import empty_bases
from edgemoe.models.loading import finite_chunks, refuse_not_finite
from edgemoe.models.opening import open_streamed
from edgemoe.models.saving import float32_names, save_settings
from edgemoe.models.shapes import Ranks
from edgemoe.models.weights.shards import (
    DEFAULT_SHARD_BYTES,
    PlannedTensor,
    ShardWriter,
    lay_out,
    write_index,
)
from edgemoe.plans.plan import LayerPlan, MergedExpert
from edgemoe.progress import counting
from edgemoe.resume import publish, resumable, resume_key

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from edgemoe.decompose.registry import DecompositionMethod
    from edgemoe.models.layers.layer import MoeLayer
    from edgemoe.models.opening import StreamedModel
    from edgemoe.models.weights.conversion import TensorGroup
    from edgemoe.models.weights.shards import Shard
    from edgemoe.plans.plan import Plan
    from edgemoe.resume import WorkDirectory

_CHECKPOINT = "checkpoint"
_PROGRESS = "progress.json"
_ANY_PROGRESS = "*progress.json"
_UNFINISHED = "shard"


@dataclass(frozen=True, kw_only=True)
class AppliedPlan:
    """What was written.

    Attributes:
        family: Transformers model type.
        experts_per_layer: Experts of each MoE layer.
        widths_per_layer: Neurons of an expert of each MoE layer.
    """

    family: str
    experts_per_layer: tuple[int, ...]
    widths_per_layer: tuple[int, ...]


@torch.no_grad()
def apply_streamed(
    path: Path | Checkpoint,
    plan: Plan,
    output: Path,
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    force: bool = False,
) -> AppliedPlan:
    """Write the compressed checkpoint.

    Factors of finished layers, then finished shards are kept in `<output>.partial` until all
    are; the same call goes on after them when it was interrupted.

    Args:
        path: The checkpoint.
        plan: The decision.
        output: Checkpoint directory to write.
        max_shard_bytes: Size of the files, which one tensor alone may exceed.
        force: Whether `output`, and unfinished work of another call, may be replaced.

    Returns:
        What was written.

    Raises:
        CheckpointError: The checkpoint is missing, unsafe or inconsistent.
        PlanError: The plan does not fit the checkpoint.
        StreamingError: The family's layers cannot be loaded one by one, or not run so where
            the plan's method runs them.
        OutputError: The output exists, or the disk has not enough space.
    """
    checkpoint = Checkpoint.open(path)
    streamed = open_streamed(checkpoint)
    plan.validate(streamed.moe.shape)
    check_ranks(plan, streamed.moe.layers)
    check_width_pruning(plan, streamed.moe)
    refuse_k_policy(plan, streamed.moe)
    widths = plan.widths(streamed.moe.shape)
    key = resume_key("apply", checkpoint, plan=plan, options=[max_shard_bytes])
    method = None if plan.factors is None else find_method(plan.factors.method)
    changes = [
        _change_shapes(streamed, layer, layer_plan, method)
        for layer, layer_plan in zip(streamed.moe.layers, plan.layers, strict=True)
        if layer_plan.ranks is not None or not keeps_all(layer_plan, layer.num_experts)
    ]
    shards = lay_out(_plan_tensors(streamed, changes), max_shard_bytes)
    with resumable(output, key, _ANY_PROGRESS, force=force) as work:
        checkpoint.hashes.remember(work)
        sha256 = checkpoint.hashes.fingerprint("read the checkpoint")
        plan.validate(streamed.moe.shape, sha256)
        if plan.factors is not None:
            kept = {change.layer.index: change.factors for change in changes}
            factor_streamed(streamed, plan, work, kept)
        directory = work.path / _CHECKPOINT
        directory.mkdir(exist_ok=True)
        _write_shards(streamed, shards, changes, work, method)
        write_index(shards, directory)
        save_k_policy(plan.k_policy, directory)
        save_settings(
            streamed.moe,
            directory,
            plan.experts_per_layer,
            source=checkpoint.path,
            provenance=describe_plan(plan, streamed.moe, sha256),
            widths=widths,
            **_stored_ranks(plan),
        )
        publish(directory, output, force=force)
    return AppliedPlan(
        family=streamed.moe.family,
        experts_per_layer=plan.experts_per_layer,
        widths_per_layer=widths,
    )


@dataclass(frozen=True, kw_only=True)
class _Change:
    """What a plan does to one layer.

    Attributes:
        layer: The layer.
        plan: Its plan.
        groups: Groups of stored tensors of which a tensor changes.
        targets: Names in the model of the tensors that are written for them.
        results: What they are called in the checkpoint, with types and shapes.
        factors: Types and shapes of the layer's factors; empty where it is not factored.
    """

    layer: MoeLayer
    plan: LayerPlan
    groups: tuple[TensorGroup, ...]
    targets: tuple[str, ...]
    results: dict[str, torch.Tensor]
    factors: dict[str, torch.Tensor]


def _stored_ranks(plan: Plan) -> dict[str, Any]:
    """Say what the weights have, which the layers in memory never get."""
    if plan.factors is None:
        return {}
    if plan.factors.shares_bases:
        return {"bases": [pair and pair[0] for pair in plan.ranks_per_layer]}
    return {"ranks": [pair and Ranks(*pair) for pair in plan.ranks_per_layer]}


def _change_shapes(
    streamed: StreamedModel,
    layer: MoeLayer,
    plan: LayerPlan,
    method: DecompositionMethod | None,
) -> _Change:
    """Carry out a plan on shapes alone."""
    skeleton, index = streamed.skeleton, layer.index
    # Merging compares values; the shapes are those of keeping one member of each.
    kept = tuple(
        MergedExpert(members=expert.members[:1], neurons=expert.neurons)
        for expert in plan.experts
    )
    with (
        skeleton.layer_on_meta(index, in_float32=float32_names(streamed.moe)),
        contextlib.ExitStack() as stack,
    ):
        before = skeleton.layer_tensors(index)
        apply_layer(layer, LayerPlan(layer=index, experts=kept))
        factors = {}
        if plan.stored_ranks is not None:
            assert method is not None
            if method.shares_bases:
                factors = empty_bases(layer, plan.stored_ranks[0])
            else:
                factors = empty_factors(layer, Ranks(*plan.stored_ranks))
            stack.enter_context(method.inside(layer, factors))
        after = skeleton.layer_tensors(index)
        changed = {name for name in before if after.get(name) is not before[name]}
        groups = tuple(
            group for group in skeleton.groups[index] if changed.intersection(group.targets)
        )
        old = {target for group in groups for target in group.targets}
        targets = tuple(name for name in after if name in old or name not in before)
        results = skeleton.conversion.revert({name: after[name] for name in targets})
    return _Change(
        layer=layer,
        plan=plan,
        groups=groups,
        targets=targets,
        results=results,
        factors=factors,
    )


def _plan_tensors(streamed: StreamedModel, changes: Sequence[_Change]) -> list[PlannedTensor]:
    by_layer = {change.layer.index: change for change in changes}
    planned: list[PlannedTensor] = []
    for index, groups in streamed.skeleton.groups.items():
        change = None if index is None else by_layer.get(index)
        computed = () if change is None else change.groups
        kept = [group for group in groups if not any(group is other for other in computed)]
        tensors = [
            PlannedTensor(
                name=name,
                dtype=source.dtype,
                shape=source.shape,
                layer=index,
                source=source,
            )
            for group in kept
            if not group.is_foreign
            for (source, _), name in zip(group.sources, group.names, strict=True)
        ]
        for group in kept:
            if group.is_foreign:
                tensors.extend(
                    PlannedTensor(
                        name=name, dtype=tensor.dtype, shape=tuple(tensor.shape), layer=index
                    )
                    for name, tensor in streamed.skeleton.conversion.revert(
                        group.targets
                    ).items()
                )
        if change is not None:
            tensors.extend(
                PlannedTensor(
                    name=name, dtype=tensor.dtype, shape=tuple(tensor.shape), layer=index
                )
                for name, tensor in change.results.items()
            )
        planned.extend(sorted(tensors, key=lambda tensor: dot_natural_key(tensor.name)))
    return planned


def _write_shards(
    streamed: StreamedModel,
    shards: Sequence[Shard],
    changes: Sequence[_Change],
    work: WorkDirectory,
    method: DecompositionMethod | None,
) -> None:
    by_layer: dict[int | None, _Change] = {change.layer.index: change for change in changes}
    directory = work.path / _CHECKPOINT
    missing = [shard for shard in shards if not (directory / shard.name).exists()]
    require_space(work.path, sum(shard.nbytes for shard in missing))
    steps = sum(len({tensor.layer for tensor in shard.tensors}) for shard in missing)
    with counting(steps, "apply the plan") as advance:
        for shard in missing:
            unfinished = work.path / _UNFINISHED
            with unfinished.open("wb") as stream:
                writer = ShardWriter(stream, shard)
                for index, tensors in itertools.groupby(shard.tensors, lambda t: t.layer):
                    change = by_layer.get(index)
                    _write_layer(streamed, writer, list(tensors), change, work, method)
                    advance()
            work.commit(unfinished, f"{_CHECKPOINT}/{shard.name}")
            work.write(_PROGRESS, {"finished": shard.name})


def _write_layer(
    streamed: StreamedModel,
    writer: ShardWriter,
    tensors: Sequence[PlannedTensor],
    change: _Change | None,
    work: WorkDirectory,
    method: DecompositionMethod | None,
) -> None:
    for tensor in tensors:
        if tensor.source is not None:
            chunks = tensor.source.read_chunks()
            writer.copy(tensor, finite_chunks(tensor.name, tensor.dtype, chunks))
    computed = [tensor for tensor in tensors if tensor.source is None]
    if computed:
        computed = _write_foreign(streamed, writer, computed, change)
    if change is None or not computed:
        return
    skeleton, index = streamed.skeleton, change.layer.index
    only = {group.first_target for group in change.groups}
    names = float32_names(streamed.moe)
    with (
        skeleton.layer(index, only=only, as_stored=True, in_float32=names),
        contextlib.ExitStack() as stack,
    ):
        apply_layer(change.layer, change.plan)
        if change.factors:
            assert method is not None
            stack.enter_context(method.inside(change.layer, read_state(work, index)))
        present: dict[str, Any] = skeleton.layer_tensors(index)
        results = skeleton.conversion.revert({name: present[name] for name in change.targets})
        del present
        for tensor in computed:
            writer.write(tensor, results.pop(tensor.name))


def _write_foreign(
    streamed: StreamedModel,
    writer: ShardWriter,
    tensors: Sequence[PlannedTensor],
    change: _Change | None,
) -> list[PlannedTensor]:
    """Write what stays, but is stored as only the whole of a checkpoint stores it.

    Args:
        streamed: The checkpoint.
        writer: Where to.
        tensors: Tensors of one layer that are not copied.
        change: What the plan does to that layer.

    Returns:
        Those of them that the plan changes.
    """
    conversion = streamed.skeleton.conversion
    left = {tensor.name: tensor for tensor in tensors}
    changed = () if change is None else change.groups
    for group in streamed.skeleton.groups[tensors[0].layer]:
        if group.is_foreign and not any(group is other for other in changed):
            names = [name for name in conversion.revert(group.targets) if name in left]
            if names:
                results = conversion.revert(dict(conversion.read(group)))
                for name in names:
                    refuse_not_finite(name, results[name])
                    writer.write(left.pop(name), results[name])
    return list(left.values())
