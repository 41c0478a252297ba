"""The request of an export, checked before any work, and its report."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgemoe.api.arguments import check_at_least_one
from edgemoe.api.method_names import PRUNING, check_name
from edgemoe.errors import ArgumentError, ExportError
from edgemoe.staging import refuse_existing, refuse_inputs_inside
from edgemoe_exporters.bundle.task_names import check_task_names
from edgemoe_exporters.targets import Target, choose_precision, find_target
from edgemoe_runtime.bundle.names import UNNAMED_TASK

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgemoe_exporters.validation.parity import Parity
    from edgemoe_runtime.bundle.file_entry import SizeReport
    from edgemoe_runtime.bundle.k_ladder import KRung
    from edgemoe_runtime.bundle.task_entry import QualityReport

DEFAULT_KEEP = 0.75
DEFAULT_METHOD = "reap"


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """Options of one export.

    Attributes:
        model: The checkpoint. Paths may be given as text.
        output: The bundle to write.
        target: One of `targets.TARGETS`.
        precision: One of `PRECISIONS`, or None for the target's own.
        tasks: Task files by task name. Without a plan, three quarters of the examples
            choose the experts and one quarter evaluates them; with a plan, all evaluate.
        plans: Plan files by task name.
        keep: Fraction of each layer's experts to keep for tasks without a plan, in (0, 1];
            None for 0.75.
        max_drop: How much worse a score may get, in [0, inf): relative for perplexity,
            absolute for accuracy. None for no gate.
        force: Whether an existing output may be replaced.
        method: Pruning method for tasks without a plan.
        seed: Its seed.
        calibration_tokens: Most tokens of each task that choose experts.
        held_out_tokens: Most tokens of each task that evaluate; the same before and after.
        memory_limit_bytes: Largest model, in float32, and largest graph that are opened as a
            whole, in bytes, [0, inf); larger ones are read layer by layer and run slice by
            slice. None for half of the memory that this process may use.
        ladder: Whether to measure a k ladder for tasks with examples to evaluate. Times are
            measured for it, so a bundle with one is not the same bytes every time.
        static_shapes: Whether a TensorRT graph must have no data-dependent shapes, which follow
            how many experts tokens use; a smaller k then saves no time.
    """

    model: Path
    output: Path
    target: str
    precision: str | None = None
    tasks: Mapping[str, Path] = field(default_factory=dict)
    plans: Mapping[str, Path] = field(default_factory=dict)
    keep: float | None = None
    max_drop: float | None = None
    force: bool = False
    method: str = DEFAULT_METHOD
    seed: int = 0
    calibration_tokens: int = 16_384
    held_out_tokens: int = 8_192
    memory_limit_bytes: int | None = None
    ladder: bool = True
    static_shapes: bool = False

    def __post_init__(self) -> None:
        for name in ("model", "output"):
            object.__setattr__(self, name, Path(getattr(self, name)))
        for name in ("tasks", "plans"):
            files = getattr(self, name)
            object.__setattr__(self, name, {task: Path(file) for task, file in files.items()})

    @property
    def names(self) -> tuple[str, ...]:
        """Tasks of the bundle, in order; one unnamed where none was given."""
        return tuple({**self.tasks, **self.plans}) or (UNNAMED_TASK,)

    @property
    def pruned_here(self) -> tuple[str, ...]:
        """Tasks whose experts are chosen by this export."""
        return tuple(name for name in self.tasks if name not in self.plans)

    @property
    def keep_or_default(self) -> float:
        """Fraction of each layer's experts to keep for tasks without a plan."""
        return DEFAULT_KEEP if self.keep is None else self.keep

    def check(self) -> tuple[Target, str]:
        """Check all that can be known before the checkpoint is opened.

        Returns:
            Target and precision.

        Raises:
            ExportError: An option breaks a rule, or two do not fit together.
            ArgumentError: A number of tokens is below 1, or the memory limit below 0.
            OutputError: The output exists and `force` is false, or holds an input.
        """
        check_at_least_one(
            calibration_tokens=self.calibration_tokens, held_out_tokens=self.held_out_tokens
        )
        if self.memory_limit_bytes is not None and self.memory_limit_bytes < 0:
            raise ArgumentError(
                f"memory_limit_bytes must be in [0, inf), got {self.memory_limit_bytes}."
            )
        target = find_target(self.target)
        precision = choose_precision(target, self.precision)
        if self.static_shapes and target.flavour != "tensorrt":
            raise ExportError(
                f"static-shapes is for graphs of TensorRT, got target {target.name}: fused "
                "experts have no shapes that follow values. Leave it out."
            )
        check_task_names(self.names)
        if self.pruned_here:
            check_name(self.method, PRUNING)
        if self.seed < 0:
            raise ExportError(f"the seed must be in [0, inf), got {self.seed}.")
        if self.keep is not None:
            if not 0 < self.keep <= 1:
                raise ExportError(
                    f"keep must be in (0, 1], got {self.keep:g}: it is the fraction of each "
                    "layer's experts that stay."
                )
            if not self.pruned_here:
                raise ExportError(
                    "keep needs a task to choose the experts for, got none without a plan. Add "
                    "--task NAME=FILE.jsonl, or leave --keep out to export the model as it is."
                )
        if self.max_drop is not None:
            if not 0 <= self.max_drop < math.inf:
                raise ExportError(
                    f"max-drop must be in [0, inf), got {self.max_drop:g}: 0.05 allows 5% more "
                    "perplexity, or five points less accuracy."
                )
            unjudged = [name for name in self.names if name not in self.tasks]
            if unjudged:
                raise ExportError(
                    f"max-drop needs lines to judge every task by, got none for "
                    f"{', '.join(unjudged)}. Add --task NAME=FILE.jsonl for it, or leave "
                    "--max-drop out."
                )
        refuse_existing(self.output, force=self.force, directory=True, resumes=True)
        inputs = (self.model, *self.tasks.values(), *self.plans.values())
        refuse_inputs_inside(self.output, *inputs)
        return target, precision


@dataclass(frozen=True, kw_only=True)
class TaskReport:
    """Results of one task.

    Attributes:
        parity: How far the graph is from the eager model with the same experts.
        quality: Scores before and after, where there were examples to evaluate.
        k_table: Mean experts per token by MoE layer, rounded up, where tokens choose.
        k_ladder: Rungs that lose little enough, where there were examples to evaluate.
    """

    parity: Parity
    quality: QualityReport | None
    k_table: tuple[int, ...] | None = None
    k_ladder: tuple[KRung, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """Results of an export.

    Attributes:
        output: The bundle.
        target: Its target.
        flavour: Whose operators the graphs use: `ort` or `tensorrt`.
        precision: Of the weights.
        experts_before: Experts of each MoE layer of the checkpoint.
        checkpoint_bytes: Size of the checkpoint's weights as the model holds them in float32.
        size: Bytes on disk.
        tasks: Results by task.
        separate_stacks: Tensors of experts that were stored apart although tasks share them.
        streamed: Whether the checkpoint was read one decoder layer at a time, because it is
            larger than memory.
        remarks: Warnings, each in a sentence.
    """

    output: Path
    target: str
    flavour: str
    precision: str
    experts_before: tuple[int, ...]
    checkpoint_bytes: int
    size: SizeReport
    tasks: Mapping[str, TaskReport]
    separate_stacks: tuple[str, ...] = ()
    streamed: bool = False
    remarks: tuple[str, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes on the export, each in a sentence."""
        notes = list(self.remarks)
        if self.streamed:
            notes.append(
                "the checkpoint is larger than memory: it was read and run one decoder layer "
                "at a time."
            )
        sliced = [name for name, task in self.tasks.items() if task.parity.slices > 1]
        if sliced:
            notes.append(
                f"the graph of {', '.join(sliced)} is larger than memory: it was compared and "
                "scored in slices, one after the other, and has no k ladder."
            )
        if self.target == "cuda" and self.precision != "fp16":
            notes.append(
                "onnxruntime has no CUDA kernels for attention and experts in float32, so most "
                f"of this {self.precision} graph runs on the CPU: use --precision fp16."
            )
        if self.separate_stacks:
            notes.append(
                f"{len(self.separate_stacks)} stacks of experts are stored apart, as their "
                f"bytes differ between tasks, such as {self.separate_stacks[0]}."
            )
        return tuple(notes)

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {
            "output": str(self.output),
            "target": self.target,
            "flavour": self.flavour,
            "precision": self.precision,
            "streamed": self.streamed,
            "experts_before": list(self.experts_before),
            "checkpoint_bytes": self.checkpoint_bytes,
            "size": self.size.to_json(),
            "notes": list(self.notes),
            "tasks": {
                name: {
                    "parity": vars(task.parity),
                    "quality": None if task.quality is None else task.quality.to_json(),
                    "k_ladder": task.k_ladder and [rung.to_json() for rung in task.k_ladder],
                }
                for name, task in self.tasks.items()
            },
        }
