"""The report of an export: sizes, quality, speed and what they are worth, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from edgemoe_exporters.validation.agreement import Agreement
    from edgemoe_exporters.validation.parity import Parity
    from edgemoe_exporters.validation.speed import Speed
    from edgemoe_runtime.bundle.file_entry import SizeReport
    from edgemoe_runtime.bundle.k_ladder import KRung
    from edgemoe_runtime.bundle.task_entry import QualityReport, WeightsInfo

SAME_TOKENS_WANTED = 0.9
"""Below this share of positions with the checkpoint's best token, a report warns."""


@dataclass(frozen=True, kw_only=True)
class TaskReport:
    """Results of one task.

    Attributes:
        parity: How far the graph is from the eager model with the same weights: whether it
            computes what it should, not whether that is good.
        quality: Scores before and after, where there were examples to evaluate.
        agreement: How often the graph's best token is the exported checkpoint's.
        weights: Whose weights the task has, and by what they were recovered.
        experts_per_layer: Experts of each MoE layer.
        speed: Times beside the unpruned bundle and the checkpoint, where they were measured.
        k_table: Mean experts per token by MoE layer, rounded up, where tokens choose.
        k_ladder: Rungs that lose little enough, where there were examples to evaluate.
    """

    parity: Parity
    quality: QualityReport | None
    agreement: Agreement
    weights: WeightsInfo
    experts_per_layer: tuple[int, ...]
    speed: Speed | None = None
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
        unpruned_bytes: Size that the bundle would have about, in bytes, if one task kept all
            experts.
        size: Bytes on disk.
        tasks: Results by task.
        separate_stacks: Tensors of experts that were stored apart although tasks share them.
        streamed: Whether the checkpoint was read one decoder layer at a time, because it is
            larger than memory.
        remarks: Warnings, each in a sentence.
        reused: What was taken from an earlier export that was refused or interrupted.
        largest_activation: With fp16, the largest absolute value that any module of the
            checkpoint's layers took in or returned, in float32, on calibration and held-out
            data; float16 holds 65504. None otherwise, or where nothing ran.
    """

    output: Path
    target: str
    flavour: str
    precision: str
    experts_before: tuple[int, ...]
    checkpoint_bytes: int
    unpruned_bytes: int
    size: SizeReport
    tasks: Mapping[str, TaskReport]
    separate_stacks: tuple[str, ...] = ()
    streamed: bool = False
    remarks: tuple[str, ...] = ()
    reused: tuple[str, ...] = ()
    largest_activation: float | None = None

    @property
    def same_token_share(self) -> float:
        """Share of positions with the checkpoint's best token, in [0, 1], of the worst task."""
        return min(task.agreement.same_token_share for task in self.tasks.values())

    @property
    def kl_nats(self) -> float:
        """Divergence from the checkpoint's next-token distributions of the worst task."""
        return max(task.agreement.kl_nats for task in self.tasks.values())

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings on quality, each in a sentence with its remedy."""
        few = {
            name: task.agreement.same_token_share
            for name, task in self.tasks.items()
            if task.agreement.same_token_share < SAME_TOKENS_WANTED
        }
        return tuple(
            f"{name} says another token than the checkpoint in {1 - share:.0%} of positions: "
            "keep more experts (--keep), recover them (--recover least-squares), or choose a "
            "higher --precision."
            for name, share in few.items()
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes on the export, each in a sentence."""
        notes = list(self.remarks)
        if self.largest_activation is not None and 2 * self.largest_activation < 65504:
            notes.append(
                f"the largest activation on the data is {self.largest_activation:.3g}; float16 "
                "holds 65504."
            )
        if self.reused:
            notes.append(f"{', '.join(self.reused)}: taken from the attempt before.")
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
            "unpruned_bytes": self.unpruned_bytes,
            "size": self.size.to_json(),
            "same_token_share": self.same_token_share,
            "kl_nats": self.kl_nats,
            "largest_activation": self.largest_activation,
            "speed": self._worst_speed(),
            "warnings": list(self.warnings),
            "notes": list(self.notes),
            "tasks": {
                name: {
                    "weights": task.weights.to_json(),
                    "experts_per_layer": list(task.experts_per_layer),
                    "parity": vars(task.parity),
                    **task.agreement.to_json(),
                    "speed": None if task.speed is None else task.speed.to_json(),
                    "quality": None if task.quality is None else task.quality.to_json(),
                    "k_ladder": task.k_ladder and [rung.to_json() for rung in task.k_ladder],
                }
                for name, task in self.tasks.items()
            },
        }

    def _worst_speed(self) -> dict[str, Any] | None:
        """Return the times of the task whose tokens take longest."""
        timed = [task.speed for task in self.tasks.values() if task.speed is not None]
        if not timed:
            return None
        return max(timed, key=lambda speed: speed.ms_per_token).to_json()
