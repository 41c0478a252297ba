"""What a recovery came to, and what its checkpoint says of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgemoe.data_provenance import digest_line, write_digests
from edgemoe.versions import library_versions

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edgemoe.recover.held_out import Quality
    from edgemoe.recover.options import RecoverOptions
    from edgemoe.recover.samples import TaskSamples
    from edgemoe.tasks import TaskFile


@dataclass(frozen=True, kw_only=True)
class Recovered:
    """Result of a recovery.

    Attributes:
        method: The method.
        family: Transformers model type.
        experts_per_layer: Experts of each MoE layer.
        before: The model as it was given, on the held-out lines.
        after: What was written, on the same lines.
        best_step: The step that was kept, or how many layers were changed; 0 where none was
            better than the start, which was then written as it was.
        steps: Steps that were taken, or layers that were tried.
        ended: Why the training ended.
        trained_parameters: Parameters that trained.
        tasks: What it was trained on.
        seconds_per_step: Mean of this run's steps, measurements included; None without one.
        unit: What is counted: `step` or `layer`.
    """

    method: str
    family: str
    experts_per_layer: tuple[int, ...]
    before: Quality
    after: Quality
    best_step: int
    steps: int
    ended: str
    trained_parameters: int
    tasks: tuple[TaskSamples, ...]
    seconds_per_step: float | None
    unit: str = "step"

    def to_dict(self) -> dict[str, Any]:
        """Return what `edgemoe recover --json` answers, but for the output."""
        tasks = {}
        for task in self.tasks:
            before, after = self.before.tasks[task.name], self.after.tasks[task.name]
            tasks[task.name] = {
                "training_tokens": task.training_tokens,
                "held_out_lines": task.held_out_lines,
                "perplexity_before": before.perplexity,
                "perplexity_after": after.perplexity,
                "accuracy_before": before.accuracy,
                "accuracy_after": after.accuracy,
                "divergence_before": before.divergence,
                "divergence_after": after.divergence,
            }
        return {
            "method": self.method,
            "family": self.family,
            "experts_per_layer": list(self.experts_per_layer),
            "improved": self.best_step > 0,
            "best_step": self.best_step,
            "steps": self.steps,
            "ended": self.ended,
            "loss_before": self.before.loss,
            "loss_after": self.after.loss,
            "trained_parameters": self.trained_parameters,
            "seconds_per_step": self.seconds_per_step,
            "tasks": tasks,
        }


def describe(
    recovered: Recovered,
    options: RecoverOptions,
    tasks: Sequence[TaskFile],
    sha256: Sequence[str],
    earlier: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return how a recovered checkpoint was made, as JSON values.

    Args:
        recovered: What the recovery came to.
        options: Settled options.
        tasks: What it was trained on.
        sha256: Fingerprints of the checkpoint that was given, and of the teacher, if any.
        earlier: How the checkpoint that was given had been made, where that is known.

    Returns:
        JSON values, for the checkpoint's note.
    """
    earlier = dict(earlier or {})
    return {
        # The plan that says which experts these are.
        **({"plan_sha256": earlier["plan_sha256"]} if "plan_sha256" in earlier else {}),
        "method": recovered.method,
        "options": options.to_dict(),
        "seed": options.seed,
        "tasks": {task.name: task.sha256 for task in tasks},
        "training_lines": write_digests({digest_line(r) for t in tasks for r in t.records}),
        "checkpoint_sha256": sha256[0],
        "teacher_sha256": sha256[1] if len(sha256) > 1 else None,
        "steps": recovered.steps,
        "best_step": recovered.best_step,
        "before_training": recovered.before.to_dict(),
        "after_training": recovered.after.to_dict(),
        "edgemoe_version": library_versions()["edgemoe"],
        "before": earlier or None,
    }
