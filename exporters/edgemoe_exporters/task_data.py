"""The inputs of an export by task: examples that choose, examples that judge, and plans."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgemoe.chat_tasks import load_task
from edgemoe.data_provenance import digest_line
from edgemoe.evaluate.contamination import examples_seen, keep_held_out, lines_of
from edgemoe.plans.plan import Plan
from edgemoe_exporters.sources.recovered import RecoveredCheckpoint
from edgemoe_exporters.validation.quality_gate import check_evidence, split_task

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgemoe.models.checkpoint import Checkpoint
    from edgemoe.tasks import TaskFile
    from edgemoe_exporters.request import ExportRequest


@dataclass(frozen=True, kw_only=True)
class TaskData:
    """The files of a request, read and checked.

    Attributes:
        files: Task files by task name.
        calibration: Examples that choose experts, of tasks without a plan, and that recover.
        held_out: Examples that evaluate; none of them was read by what made the weights.
        plans: Plans by task name; none of tasks with a recovered checkpoint.
        recovered: Recovered checkpoints by task name.
        remarks: Warnings, each in a sentence.
    """

    files: Mapping[str, TaskFile]
    calibration: Mapping[str, TaskFile]
    held_out: Mapping[str, TaskFile]
    plans: Mapping[str, Plan]
    recovered: Mapping[str, RecoveredCheckpoint]
    remarks: tuple[str, ...]

    @classmethod
    def load(cls, request: ExportRequest, checkpoint: Checkpoint) -> TaskData:
        """Read the files.

        Args:
            request: The request, which was checked.
            checkpoint: The checkpoint to export.

        Returns:
            Their content.

        Raises:
            TaskFileError: A task file breaks the format, is too short to be split, or has too
                few lines to judge by that nothing was made from.
            PlanError: A plan breaks the format.
            ExportError: A recovered checkpoint is of another model, or the limit is out of
                range for a task.
        """
        files = {
            name: load_task(name, path, checkpoint.path, checkpoint.read)
            for name, path in request.tasks.items()
        }
        trained = {*request.pruned_here, *request.recovered_here}
        splits = {name: split_task(file) for name, file in files.items() if name in trained}
        given = {name: Plan.load(path) for name, path in request.plans.items()}
        recovered = {
            name: RecoveredCheckpoint.open(name, path, checkpoint, given.get(name))
            for name, path in request.recovered.items()
        }
        plans = {name: plan for name, plan in given.items() if name not in recovered}
        evaluated = {
            name: splits[name][1] if name in splits else file for name, file in files.items()
        }
        # Examples that earlier compression of the checkpoint read must not evaluate it either.
        before = examples_seen(request.model, "", checkpoint.read)
        remarks = []
        for name, file in evaluated.items():
            lines = before | (_lines_of_plan(given[name]) if name in given else frozenset())
            if name in recovered:
                lines |= recovered[name].lines
            if name in splits:
                lines |= {digest_line(record) for record in splits[name][0].records}
            evaluated[name], remark = _leave_out(
                file, lines, gated=request.max_drop is not None
            )
            remarks += [] if remark is None else [remark]
            if request.max_drop is not None:
                check_evidence(
                    evaluated[name],
                    request.max_drop,
                    checkpoint.tokenizer,
                    max_length=checkpoint.max_length,
                    max_tokens=request.held_out_tokens,
                    accept_large=request.accept_large_drop,
                    accept_few=request.accept_weak_evidence,
                )
        return cls(
            files=files,
            calibration={name: split[0] for name, split in splits.items()},
            held_out=evaluated,
            plans=plans,
            recovered=recovered,
            remarks=tuple(remarks),
        )


def _lines_of_plan(plan: Plan) -> frozenset[int]:
    """Return the digests of the lines that a plan, and its k policy, were made from."""
    policy = None if plan.k_policy is None else plan.k_policy.describe()
    return lines_of({"calibration_lines": plan.calibration_lines, "k_policy": policy})


def _leave_out(
    file: TaskFile, lines: frozenset[int], *, gated: bool
) -> tuple[TaskFile, str | None]:
    """Leave out the lines that what is judged was made from.

    Where no other line is left, a limit cannot be judged; without one the score is told, with
    a warning.
    """
    subject = f"the graph of {file.name}"
    new = [record for record in file.records if digest_line(record) not in lines]
    if not new and not gated:
        return keep_held_out(file, lines, "warn", subject)
    kept, _ = keep_held_out(file, lines, "skip", subject)
    left_out = len(file.records) - len(kept.records)
    if not left_out:
        return file, None
    return kept, (
        f"{left_out} of {len(file.records)} lines of {file.name} judge nothing, because "
        "calibration or training read the same text."
    )
