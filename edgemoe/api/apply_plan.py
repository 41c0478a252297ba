"""Carry out a plan on its checkpoint."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, overload

from edgemoe.api.arguments import as_path, check_plan, files_of, load_plan
from edgemoe.api.checks import check_checkpoint, check_output
from edgemoe.api.extras import needs
from edgemoe.api.running import running
from edgemoe.errors import ArgumentError
from edgemoe.staging import reserved

if TYPE_CHECKING:
    from edgemoe.api.arguments import StrPath
    from edgemoe.models.checkpoint import Checkpoint
    from edgemoe.models.contract import MoeModel
    from edgemoe.plans.plan import Plan
    from edgemoe.progress import OnProgress

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ApplyReport:
    """The checkpoint that was written.

    Attributes:
        output: Its directory.
        family: Transformers model type.
        plan: What was carried out; its `experts_per_layer` and `ranks_per_layer` are those of
            the checkpoint.
        widths_per_layer: Intermediate channels of an expert of each MoE layer, as stored.
    """

    output: Path
    family: str
    plan: Plan
    widths_per_layer: tuple[int, ...]


@overload
def apply_plan(
    model: StrPath,
    plan: Plan | StrPath,
    output: StrPath,
    *,
    max_shard_gb: float = ...,
    force: bool = ...,
    on_progress: OnProgress | None = ...,
) -> ApplyReport: ...
@overload
def apply_plan(
    model: StrPath,
    plan: Plan | StrPath,
    output: None = None,
    *,
    max_shard_gb: float = ...,
    force: bool = ...,
    on_progress: OnProgress | None = ...,
) -> MoeModel: ...
def apply_plan(
    model: StrPath,
    plan: Plan | StrPath,
    output: StrPath | None = None,
    *,
    max_shard_gb: float = 4.0,
    force: bool = False,
    on_progress: OnProgress | None = None,
) -> ApplyReport | MoeModel:
    """Keep, narrow, merge and factor the experts of a checkpoint as a plan says.

    With `output` a checkpoint directory is written, with one decoder layer in memory at a time;
    `<output>.partial` keeps finished weight files, and after an interruption the same call goes
    on after them. Where the layers of a family cannot be read one by one the model is loaded
    whole; the logger `edgemoe.api` says so at level INFO. Without `output` nothing is written:
    the model is loaded whole and compressed in memory.

    Args:
        model: Checkpoint directory.
        plan: The plan, or its file.
        output: Checkpoint directory to write; None writes none.
        max_shard_gb: Size of the weight files in 10^9 bytes, in (0, inf).
        force: Whether `output`, and unfinished work of another call, may be replaced.
        on_progress: Called with each `edgemoe.progress.ProgressEvent`; None draws a bar
            where stderr is a terminal.

    Returns:
        With `output` what was written; without it the compressed model, in float32 on the CPU.

    Raises:
        ArgumentError: `max_shard_gb` is out of range.
        PlanError: The plan is malformed, or does not fit the checkpoint.
        CheckpointError: The checkpoint is missing, unsafe or inconsistent.
        FamilyError: The family is not supported.
        StreamingError: The plan's method runs layers one by one, which the family's cannot.
        OutputError: `output` exists and `force` is false, or the disk has not enough space.
        MissingDependencyError: The extra `export` is not installed.

    Example:
        >>> from edgemoe import apply_plan
        >>> report = apply_plan("moe", "code.plan.json", "moe-code")
        >>> model = apply_plan("moe", "code.plan.json")
    """
    if not max_shard_gb > 0:
        raise ArgumentError(f"max_shard_gb must be in (0, inf), got {max_shard_gb}.")
    path, target = Path(model), as_path(output)
    needs("export")
    check_output(target, path, *files_of(plan), force=force, directory=True)
    check_checkpoint(path)
    decision = load_plan(plan)
    with (
        running("export", on_progress=on_progress),
        reserved(target, force=force, directory=True, resumes=True),
    ):
        from edgemoe.apply.in_memory import apply_plan as apply_in_memory
        from edgemoe.models import load_model
        from edgemoe.models.checkpoint import Checkpoint

        if target is None:
            return apply_in_memory(load_model(path), decision)
        checkpoint = Checkpoint(path)
        shape = checkpoint.shape
        check_plan(decision, checkpoint)
        family = _write(checkpoint, decision, target, int(max_shard_gb * 1e9), force=force)
        return ApplyReport(
            output=target, family=family, plan=decision, widths_per_layer=decision.widths(shape)
        )


def _write(
    model: Checkpoint, plan: Plan, output: Path, max_shard_bytes: int, *, force: bool
) -> str:
    """Write layer by layer, or whole where that cannot be done; return the family."""
    from edgemoe.apply.in_memory import apply_plan as apply_in_memory
    from edgemoe.apply.streamed import apply_streamed
    from edgemoe.errors import StreamingError
    from edgemoe.models import load_model, save_model
    from edgemoe.staging import staged_directory

    try:
        return apply_streamed(
            model, plan, output, max_shard_bytes=max_shard_bytes, force=force
        ).family
    except StreamingError as error:
        _LOG.info("%s The whole model is loaded instead.", error)
    applied = apply_in_memory(load_model(model), plan)
    with staged_directory(output, force=force) as staged:
        save_model(applied, staged, source=model.path)
    return applied.family
