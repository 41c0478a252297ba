"""The request of an export, checked before any work."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from edgemoe.api.arguments import check_at_least_one
from edgemoe.api.method_names import PRUNING, check_name
from edgemoe.errors import ArgumentError, ExportError
from edgemoe.staging import refuse_existing, refuse_inputs_inside
from edgemoe_exporters.bundle.task_names import check_task_names
from edgemoe_exporters.targets import Target, choose_precision, find_target
from edgemoe_runtime.bundle.names import UNNAMED_TASK

if TYPE_CHECKING:
    from collections.abc import Mapping

DEFAULT_KEEP = 0.75
DEFAULT_METHOD = "reap"
AUTO: Literal["auto"] = "auto"
Keep: TypeAlias = "float | Literal['auto']"


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """Options of one export.

    Attributes:
        model: The checkpoint. Paths may be given as text.
        output: The bundle to write.
        target: One of `targets.TARGETS`.
        precision: One of `PRECISIONS`, or None for the target's own.
        tasks: Task files by task name. Without a plan, three quarters of the examples
            choose the experts and one quarter evaluates them; with a plan or a recovered
            checkpoint, all evaluate, except those that these were made from.
        plans: Plan files by task name.
        recovered: Checkpoints by task name that were made from `model` by a plan and
            `edgemoe.recover`: the task gets their weights.
        recover: Methods of `edgemoe.recover`, one after the other, each `METHOD` or
            `METHOD:NAME=VALUE,...`: what is pruned is recovered on the lines that chose it,
            with `model` as the teacher.
        keep: Fraction of each layer's experts to keep for tasks without a plan, in (0, 1], or
            "auto" for the deepest cut within `max_drop`; None for 0.75.
        max_drop: How much worse a score may get, by the upper end of the 95% interval of its
            drop: relative for perplexity, absolute for accuracy, in [0, 1]. None for no gate.
        accept_weak_evidence: Whether fewer than 20 lines may judge, or a checkpoint that is not
            better than chance; the report says so.
        accept_large_drop: Whether `max_drop` may let a perplexity more than double.
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
        speed: Whether to time the bundle beside an unpruned one and the checkpoint, for target
            cpu; times are in the manifest, as those of a ladder are.
        static_shapes: Whether a TensorRT graph must have no data-dependent shapes, which follow
            how many experts tokens use; a smaller k then saves no time.
    """

    model: Path
    output: Path
    target: str
    precision: str | None = None
    tasks: Mapping[str, Path] = field(default_factory=dict)
    plans: Mapping[str, Path] = field(default_factory=dict)
    recovered: Mapping[str, Path] = field(default_factory=dict)
    recover: tuple[str, ...] = ()
    keep: Keep | None = None
    max_drop: float | None = None
    accept_weak_evidence: bool = False
    accept_large_drop: bool = False
    force: bool = False
    method: str = DEFAULT_METHOD
    seed: int = 0
    calibration_tokens: int = 16_384
    held_out_tokens: int = 8_192
    memory_limit_bytes: int | None = None
    ladder: bool = True
    speed: bool = True
    static_shapes: bool = False

    def __post_init__(self) -> None:
        for name in ("model", "output"):
            object.__setattr__(self, name, Path(getattr(self, name)))
        methods = (self.recover,) if isinstance(self.recover, str) else self.recover
        object.__setattr__(self, "recover", split_recoveries(*methods))
        for name in ("tasks", "plans", "recovered"):
            files = getattr(self, name)
            object.__setattr__(self, name, {task: Path(file) for task, file in files.items()})

    @property
    def names(self) -> tuple[str, ...]:
        """Tasks of the bundle, in order; one unnamed where none was given."""
        return tuple({**self.tasks, **self.plans, **self.recovered}) or (UNNAMED_TASK,)

    @property
    def pruned_here(self) -> tuple[str, ...]:
        """Tasks whose experts are chosen by this export."""
        given = {**self.plans, **self.recovered}
        return tuple(name for name in self.tasks if name not in given)

    @property
    def recovered_here(self) -> tuple[str, ...]:
        """Tasks that this export recovers."""
        return tuple(name for name in self.names if self.recover and name not in self.recovered)

    @property
    def keep_or_default(self) -> float | None:
        """Fraction of each layer's experts to keep for tasks without a plan; None for auto."""
        if self.keep == AUTO:
            return None
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
        self._check_recoveries()
        if self.keep is not None:
            if self.keep == AUTO and self.max_drop is None:
                raise ExportError(
                    "keep auto needs a limit for the cut to hold, got none. Add --max-drop, "
                    "such as 0.05, or give a fraction."
                )
            if self.keep != AUTO and not (
                isinstance(self.keep, (int, float)) and 0 < self.keep <= 1
            ):
                raise ExportError(
                    f"keep must be in (0, 1] or auto, got {self.keep}: it is the fraction of "
                    "each layer's experts that stay."
                )
            if not self.pruned_here:
                raise ExportError(
                    "keep needs a task to choose the experts for, got none without a plan. Add "
                    "--task NAME=FILE.jsonl, or leave --keep out to export the model as it is."
                )
        if self.max_drop is not None:
            # Whether it is large for its task is known once the files are read.
            from edgemoe.evaluate.gate import find_limit_fault

            fault = find_limit_fault(self.max_drop, "text", accept_large=True)
            if fault is not None:
                raise ExportError(fault)
            unjudged = [name for name in self.names if name not in self.tasks]
            if unjudged:
                raise ExportError(
                    f"max-drop needs lines to judge every task by, got none for "
                    f"{', '.join(unjudged)}. Add --task NAME=FILE.jsonl for it, or leave "
                    "--max-drop out."
                )
        refuse_existing(self.output, force=self.force, directory=True, resumes=True)
        inputs = (*self.tasks.values(), *self.plans.values(), *self.recovered.values())
        refuse_inputs_inside(self.output, self.model, *inputs)
        return target, precision

    def _check_recoveries(self) -> None:
        if not self.recover:
            return
        from edgemoe.sweep.recoveries import read_recoveries

        read_recoveries(self.recover)
        untrained = [name for name in self.recovered_here if name not in self.tasks]
        if untrained or not self.recovered_here:
            raise ExportError(
                "recover needs lines of every pruned task to train on, got none for "
                f"{', '.join(untrained) or 'any'}. Add --task NAME=FILE.jsonl for it, or leave "
                "--recover out."
            )


def split_recoveries(*texts: str) -> tuple[str, ...]:
    """Split methods of recovery at the commas that end them.

    Args:
        texts: `METHOD[:NAME=VALUE,...]` each, or several with commas between them.

    Returns:
        One text for each method, with its options.
    """
    found: list[str] = []
    for part in (part.strip() for text in texts for part in text.split(",")):
        name, equals, _ = part.partition("=")
        if equals and ":" not in name and found:
            found[-1] += f",{part}"
        else:
            found.append(part)
    return tuple(found)
