"""The export pipeline, end to end: checkpoint in, checked bundle out, or nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from edgemoe.api.arguments import check_plan
from edgemoe.apply.checks import check_width_pruning, refuse_changes, refuse_k_policy
from edgemoe.disk import require_space
from edgemoe.models.checkpoint import Checkpoint
from edgemoe.models.memory_budget import default_limit
from edgemoe.models.opening import open_larger
from edgemoe.prune.registry import count_for
from edgemoe_exporters.bundle.end_tokens import NO_END, find_end_tokens
from edgemoe_exporters.bundle.task_experts import (
    count_least_parameters,
    count_parameters,
    refuse_factors,
    sizes_after_pruning,
)
from edgemoe_exporters.bundle.writer import copy_model_files
from edgemoe_exporters.choosing import TaskChooser
from edgemoe_exporters.cut_search import list_cuts
from edgemoe_exporters.export_keys import keys_of
from edgemoe_exporters.graph_making import GraphMaker
from edgemoe_exporters.precision import PRECISIONS, check_block_sizes
from edgemoe_exporters.report import ExportReport
from edgemoe_exporters.resumable_export import open_checkpointing
from edgemoe_exporters.sources.opening import ModelSource
from edgemoe_exporters.sources.task_model import lay_out_tasks
from edgemoe_exporters.stages import ExportStages, OnStage, with_speed
from edgemoe_exporters.task_data import TaskData
from edgemoe_exporters.timing import estimate_unpruned, time_tasks
from edgemoe_exporters.tracing.prepare.model import check_exportable
from edgemoe_exporters.validation.graph_runner import check_engine
from edgemoe_runtime.bundle.integrity import verify_bundle

if TYPE_CHECKING:
    from edgemoe.models.contract import MoeModel
    from edgemoe_exporters.request import ExportRequest
    from edgemoe_exporters.sources.task_model import TaskModel

# Bytes of a graph for each parameter, at most: embeddings stay wider than 4 bits.
_BYTES_PER_PARAMETER = {"fp32": 4.1, "fp16": 2.1, "int8": 1.5, "int4": 1.2}


def run_export(request: ExportRequest, on_stage: OnStage) -> ExportReport:
    """Export a checkpoint; arguments, result and errors are those of `export_bundle`.

    Args:
        request: What to export.
        on_stage: Called with a short text at the beginning of each stage.

    Returns:
        Sizes, parity and quality.

    Raises:
        EdgemoeError: Something is refused, a graph disagrees with eager, or a score fell more
            than allowed; the output is then as it was before.
    """
    target, precision = request.check()
    check_engine(target.flavour)
    model = Checkpoint(request.model)
    data = TaskData.load(request, model)
    structure = model.structure
    shape = structure.shape
    check_exportable(model, precision)
    for found in data.recovered.values():
        check_exportable(found.checkpoint, precision)
    # Plans that no later stage could apply are refused before anything is loaded or calibrated.
    for name, plan in data.plans.items():
        check_plan(plan, model)
        if name not in request.recovered_here:
            refuse_factors(name, plan)
        check_width_pruning(plan, structure)
        refuse_k_policy(plan, structure)
    keep = request.keep_or_default
    if request.pruned_here and (keep is None or keep < 1):
        refuse_changes(structure)
    if target.flavour == "ort":
        check_block_sizes(shape, precision)
    if request.pruned_here:
        least = count_for(request.method, shape, keep) if keep else _deepest(request, model)
    else:
        least = ()
    tokenizer = model.tokenizer
    ends = find_end_tokens(model, tokenizer)
    limit = request.memory_limit_bytes
    limit = default_limit() if limit is None else limit
    on_stage("open the checkpoint")
    larger = open_larger(model, limit)
    recovered = {name: found.checkpoint for name, found in data.recovered.items()}
    keys = keys_of(request, precision, model, data.files, data.plans, recovered)
    with open_checkpointing(request, keys, kept=larger is not None) as checkpointing:
        sha256 = checkpointing.fingerprint(model.hashes) if data.plans else None
        for plan in data.plans.values():
            plan.validate(shape, sha256)
        copy_model_files(model, checkpointing.staged)
        source = ModelSource(model, larger, checkpointing.work)
        bytes_per_parameter = _BYTES_PER_PARAMETER[precision]
        written = checkpointing.written_bytes()
        multiple = PRECISIONS[precision].block if PRECISIONS[precision].bits else 1
        kept = [
            tuple(zip(given.experts_per_layer, given.widths(shape), strict=True))
            if (given := data.plans.get(name)) is not None
            else sizes_after_pruning(request.method, shape, least)
            for name in request.names
            # What a recovered checkpoint shares is known once it is written.
            if name not in data.recovered
        ]
        parameters = sum(parameter.numel() for parameter in structure.model.parameters())
        if kept:
            fewest = count_least_parameters(structure, kept, multiple) * bytes_per_parameter
            require_space(checkpointing.staged, int(fewest) - written)
        maker = GraphMaker(request, target, precision, on_stage, limit, checkpointing.work)
        chooser = TaskChooser(model, source, data, maker, checkpointing, tokenizer)
        stages = ExportStages(chooser, maker, checkpointing, source, ends)
        before = stages.evaluate_before()
        with stages.sharing_quantised():
            tasks = chooser.choose(before)
            layouts = lay_out_tasks(tasks, shape)
            stored = _count_stored(structure, tasks, multiple)
            # Weights of several tasks are in one file until all graphs are known, and quantised
            # matrices are cached in another.
            times = 3 if len(tasks) > 1 else 1
            require_space(
                checkpointing.staged, int(stored * bytes_per_parameter * times) - written
            )
            graphs = stages.write_graphs(tasks, layouts)
            reports = {
                name: stages.validate(name, task, graphs.eager[name], before, layouts)
                for name, task in tasks.items()
            }
            unpruned_bytes = estimate_unpruned(stages, tasks, multiple)
            speeds = time_tasks(stages, tasks, unpruned_bytes)
        reports = {name: with_speed(one, speeds.get(name)) for name, one in reports.items()}
        # Reading a large checkpoint only to hash it takes as long as copying it.
        source.moe.sha256 = checkpointing.fingerprint(model.hashes)
        manifest = stages.write_manifest(tasks, layouts, graphs, reports)
        on_stage("verify the bundle")
        verify_bundle(checkpointing.staged, hashes=False)
    return ExportReport(
        output=request.output,
        target=target.name,
        flavour=target.flavour,
        precision=precision,
        experts_before=shape.experts_per_layer,
        checkpoint_bytes=parameters * 4,
        unpruned_bytes=unpruned_bytes,
        streamed=source.is_streamed,
        size=graphs.size,
        tasks={
            name: replace(report, k_ladder=manifest.tasks[name].k_ladder)
            for name, report in reports.items()
        },
        separate_stacks=graphs.separate_stacks,
        remarks=(*data.remarks, *([] if ends else [NO_END])),
        reused=tuple(checkpointing.reused),
    )


def _deepest(request: ExportRequest, model: Checkpoint) -> tuple[int, ...]:
    """Return what is left of a model at least where the depth of the cut is searched for."""
    return list_cuts(request.method, model.structure.shape)[-1].counts


def _count_stored(structure: MoeModel, tasks: dict[str, TaskModel], multiple: int) -> int:
    """Count the parameters that a bundle stores at most."""
    own = {name: task for name, task in tasks.items() if task.recovered is None}
    stored = sum(
        sum(int(parameter.numel()) for parameter in task.view.model.parameters())
        for task in tasks.values()
        if task.recovered is not None
    )
    if own:
        layouts = lay_out_tasks(own, structure.shape)
        plans = {name: task.plan for name, task in own.items()}
        stored += count_parameters(structure, plans, layouts, multiple)
    return stored
