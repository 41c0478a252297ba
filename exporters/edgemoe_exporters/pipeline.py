"""The export pipeline, end to end: checkpoint in, checked bundle out, or nothing."""

from __future__ import annotations

from dataclasses import replace

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
    lay_out_plans,
    refuse_factors,
    sizes_after_pruning,
)
from edgemoe_exporters.bundle.writer import copy_model_files
from edgemoe_exporters.precision import PRECISIONS, check_block_sizes
from edgemoe_exporters.request import ExportReport, ExportRequest
from edgemoe_exporters.resumable_export import key_of, open_checkpointing
from edgemoe_exporters.sources.opening import ModelSource
from edgemoe_exporters.stages import ExportStages, OnStage
from edgemoe_exporters.task_data import TaskData
from edgemoe_exporters.tracing.prepare.model import check_exportable
from edgemoe_exporters.validation.graph_runner import check_engine
from edgemoe_runtime.bundle.integrity import verify_bundle

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
    # Plans that no later stage could apply are refused before anything is loaded or calibrated.
    for name, plan in data.plans.items():
        check_plan(plan, model)
        refuse_factors(name, plan)
        check_width_pruning(plan, structure)
        refuse_k_policy(plan, structure)
    if request.pruned_here and request.keep_or_default < 1:
        refuse_changes(structure)
    if target.flavour == "ort":
        check_block_sizes(shape, precision)
    counts = (
        count_for(request.method, shape, request.keep_or_default) if request.pruned_here else ()
    )
    tokenizer = model.tokenizer
    ends = find_end_tokens(model, tokenizer)
    limit = request.memory_limit_bytes
    limit = default_limit() if limit is None else limit
    on_stage("open the checkpoint")
    larger = open_larger(model, limit)
    key = key_of(request, precision, model, data.files, data.plans)
    with open_checkpointing(request, key, kept=larger is not None) as checkpointing:
        sha256 = checkpointing.fingerprint(model.hashes) if data.plans else None
        for plan in data.plans.values():
            plan.validate(shape, sha256)
        copy_model_files(model, checkpointing.staged)
        source = ModelSource(model, larger, checkpointing.work)
        parameters = sum(parameter.numel() for parameter in source.moe.model.parameters())
        bytes_per_parameter = _BYTES_PER_PARAMETER[precision]
        written = checkpointing.written_bytes()
        multiple = PRECISIONS[precision].block if PRECISIONS[precision].bits else 1
        kept = [
            tuple(zip(given.experts_per_layer, given.widths(shape), strict=True))
            if (given := data.plans.get(name)) is not None
            else sizes_after_pruning(request.method, shape, counts)
            for name in request.names
        ]
        least = count_least_parameters(source.moe, kept, multiple) * bytes_per_parameter
        require_space(checkpointing.staged, int(least) - written)
        stages = ExportStages(
            request,
            target,
            precision,
            checkpointing,
            source,
            tokenizer,
            data,
            on_stage,
            limit,
            ends,
        )
        plans = stages.choose_plans(counts)
        before = stages.evaluate_before()
        layouts = lay_out_plans(plans, shape)
        parameters_stored = count_parameters(source.moe, plans, layouts, multiple)
        needed = parameters_stored * bytes_per_parameter
        # Weights of several tasks are in one file until all graphs are known, and quantised
        # matrices are cached in another.
        require_space(
            checkpointing.staged, int(needed * (3 if len(plans) > 1 else 1)) - written
        )
        graphs = stages.write_graphs(plans, layouts)
        reports = {
            name: stages.validate(name, plan, graphs.eager[name], before)
            for name, plan in plans.items()
        }
        # Reading a large checkpoint only to hash it takes as long as copying it.
        source.moe.sha256 = checkpointing.fingerprint(model.hashes)
        manifest = stages.write_manifest(plans, layouts, graphs, reports)
        on_stage("verify the bundle")
        verify_bundle(checkpointing.staged, hashes=False)
    return ExportReport(
        output=request.output,
        target=target.name,
        flavour=target.flavour,
        precision=precision,
        experts_before=shape.experts_per_layer,
        checkpoint_bytes=parameters * 4,
        streamed=source.is_streamed,
        size=graphs.size,
        tasks={
            name: replace(report, k_ladder=manifest.tasks[name].k_ladder)
            for name, report in reports.items()
        },
        separate_stacks=graphs.separate_stacks,
        remarks=(*data.remarks, *([] if ends else [NO_END])),
    )
