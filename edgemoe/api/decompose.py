"""Decide the ranks of the experts that a task keeps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edgemoe.api.arguments import (
    as_path,
    check_measured,
    files_of,
    load_plan,
    option_texts,
    read_statistics,
)
from edgemoe.api.checks import check_checkpoint, check_fraction, check_output
from edgemoe.api.extras import needs
from edgemoe.api.method_names import DECOMPOSITION, check_name, check_options
from edgemoe.api.running import running
from edgemoe.staging import reserved

if TYPE_CHECKING:
    from edgemoe.api.arguments import Options, StrPath
    from edgemoe.calibrate.statistics import Statistics
    from edgemoe.decompose.decision import RankedPlan
    from edgemoe.plans.plan import Plan
    from edgemoe.progress import OnProgress


def decompose(
    model: StrPath,
    statistics: Statistics | StrPath,
    task: str,
    method: str,
    param_ratio: float,
    output: StrPath | None = None,
    *,
    plan: Plan | StrPath | None = None,
    options: Options = (),
    force: bool = False,
    on_progress: OnProgress | None = None,
) -> RankedPlan:
    """Decide the ranks with which experts are stored as products of thinner matrices.

    No weight is moved until `edgemoe.apply_plan`. With `output` the plan is written as
    JSON; without it nothing is. The plan of `svd-whitened` and of `shared-basis` holds tokens
    of the statistics, which applying it runs the model's layers on: whoever has the plan can
    read them.

    Sources: `svd` https://arxiv.org/abs/2411.01016, `svd-whitened`
    https://arxiv.org/abs/2503.12340; `edgemoe.decompose.shared_basis` names those of
    `shared-basis`.

    Args:
        model: Checkpoint directory.
        statistics: Statistics of that checkpoint, or their file.
        task: A task of the statistics.
        method: `shared-basis`, `svd` or `svd-whitened`.
        param_ratio: Fraction of the parameters of the routed experts that `plan` keeps that may
            be stored, in (0, 1].
        output: Plan file to write; None writes none.
        plan: Plan of `edgemoe.prune`, or its file, whose experts are factored; None
            factors all.
        options: Options of the method by name, such as `{"multiple": 8}`.
        force: Whether `output` may be replaced.
        on_progress: Called with each `edgemoe.progress.ProgressEvent`; None draws a bar
            where stderr is a terminal.

    Returns:
        `.plan`, the plan with ranks, and the parameters that its experts have and will have.

    Raises:
        PlanError: The checkpoint or the plan is factored already, or the method, an option or
            the ratio is out of range.
        StatisticsError: The statistics are of another checkpoint, or not of the task.
        CheckpointError: The checkpoint is missing, unsafe or inconsistent.
        FamilyError: The family is not supported.
        StreamingError: An option runs the model's layers, which cannot be done.
        OutputError: `output` exists and `force` is false, or cannot be written.
        MissingDependencyError: The extra `export` is not installed.

    Example:
        >>> from edgemoe import decompose
        >>> ranked = decompose("moe", "code.stats", "code", "svd", 0.7)
        >>> share = ranked.parameters_after / ranked.parameters_before
    """
    path, target = Path(model), as_path(output)
    needs("export")
    check_name(method, DECOMPOSITION)
    texts = option_texts(options)
    check_options(method, DECOMPOSITION, texts)
    check_fraction(
        "--param-ratio", "the fraction of the experts' parameters to keep,", float(param_ratio)
    )
    check_output(target, path, *files_of(statistics, plan), force=force, directory=False)
    check_checkpoint(path)
    measured = read_statistics(statistics)
    measured.task(task)
    given = None if plan is None else load_plan(plan)
    with (
        running("export", on_progress=on_progress),
        reserved(target, force=force, directory=False),
    ):
        from edgemoe.apply.checks import refuse_changes
        from edgemoe.apply.expert_tensors import planned_tensors
        from edgemoe.decompose.decision import add_ranks, read_options
        from edgemoe.layerwise.provider import open_layers
        from edgemoe.models.checkpoint import Checkpoint
        from edgemoe.plans.keep_all import keep_all

        chosen = read_options(method, texts)
        checkpoint = Checkpoint(path)
        structure = checkpoint.structure
        refuse_changes(structure)
        start = keep_all(structure.shape) if given is None else given
        sha256 = checkpoint.sha256
        start.validate(structure.shape, sha256)
        found = add_ranks(
            start,
            structure.layers,
            check_measured(measured, statistics, path, sha256, "factored"),
            task,
            method,
            float(param_ratio),
            open_layers=lambda: open_layers(checkpoint),
            prepare=planned_tensors,
            options=chosen,
        )
        if target is not None:
            found.plan.save(target, force=force)
    return found
