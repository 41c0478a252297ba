"""The task files and plans of an export, split into calibration and held-out examples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgemoe.chat_tasks import load_task
from edgemoe.data_provenance import read_digests
from edgemoe.evaluate.contamination import examples_seen, keep_held_out
from edgemoe.plans.plan import Plan
from edgemoe_exporters.validation.quality_gate import split_task

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
        calibration: Examples that choose experts, of tasks without a plan.
        held_out: Examples that evaluate.
        plans: Plans by task name.
        remarks: Warnings, each in a sentence.
    """

    files: Mapping[str, TaskFile]
    calibration: Mapping[str, TaskFile]
    held_out: Mapping[str, TaskFile]
    plans: Mapping[str, Plan]
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
            TaskFileError: A task file breaks the format, or is too short to be split.
            PlanError: A plan breaks the format.
        """
        files = {
            name: load_task(name, path, request.model) for name, path in request.tasks.items()
        }
        splits = {name: split_task(files[name]) for name in request.pruned_here}
        plans = {name: Plan.load(path) for name, path in request.plans.items()}
        evaluated = {
            name: splits[name][1] if name in splits else file for name, file in files.items()
        }
        # Examples that earlier compression of the checkpoint read must not evaluate it either.
        before = examples_seen(request.model, "", checkpoint.read)
        remarks = []
        for name, file in evaluated.items():
            chosen_on = plans[name].calibration_lines if name in plans else None
            made_from = read_digests(chosen_on or "")
            lines = made_from | before
            _, remark = keep_held_out(file, lines, "warn", f"the graph of {name}")
            remarks += [] if remark is None else [remark]
        return cls(
            files=files,
            calibration={name: split[0] for name, split in splits.items()},
            held_out=evaluated,
            plans=plans,
            remarks=tuple(remarks),
        )
