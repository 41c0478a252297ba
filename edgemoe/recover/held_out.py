"""How good a model is on the lines that training never sees."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from edgemoe.evaluate.batches import BATCH_TOKENS, make_batches
from edgemoe.evaluate.torch_scorer import TorchScorer
from edgemoe.progress import track
from edgemoe.recover.losses import Batch, add_up, count_tokens

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import PreTrainedModel

    from edgemoe.evaluate.requests import EvalExample
    from edgemoe.recover.options import RecoverOptions
    from edgemoe.recover.samples import TaskSamples


@dataclass(frozen=True, kw_only=True)
class TaskQuality:
    """A model on the held-out lines of one task.

    Attributes:
        cross_entropy: Mean over scored tokens, in nats.
        divergence: Mean over tokens of T^2 KL(teacher || student), in nats; None without a
            teacher.
        accuracy: Of a task of choices, the fraction whose right one is the likeliest, in
            [0, 1]; else None.
    """

    cross_entropy: float
    divergence: float | None = None
    accuracy: float | None = None

    @property
    def perplexity(self) -> float:
        """exp(cross-entropy), as `edgemoe evaluate` tells it; infinite where that overflows."""
        return math.exp(self.cross_entropy) if self.cross_entropy < 700 else math.inf


@dataclass(frozen=True, kw_only=True)
class Quality:
    """A model on the held-out lines of all tasks.

    Attributes:
        tasks: One entry per task.
        loss: Mean over the tasks of what is trained to fall.
    """

    tasks: Mapping[str, TaskQuality]
    loss: float

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {"loss": self.loss, "tasks": {name: asdict(t) for name, t in self.tasks.items()}}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Quality:
        """Undo `to_dict`."""
        tasks = {name: TaskQuality(**found) for name, found in value["tasks"].items()}
        return cls(tasks=tasks, loss=value["loss"])


def mix(divergence: float, cross_entropy: float, kd_weight: float | None) -> float:
    """Return the loss: `kd_weight` parts divergence, the rest cross-entropy."""
    if kd_weight is None:
        return cross_entropy
    return kd_weight * divergence + (1 - kd_weight) * cross_entropy


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    tasks: Sequence[TaskSamples],
    options: RecoverOptions,
    *,
    show: bool = False,
) -> Quality:
    """Measure a model on the held-out lines.

    Args:
        model: The model.
        teacher: The teacher, if any.
        tasks: The tasks.
        options: Settled options: temperature and share of the divergence.
        show: Whether to draw a bar, and to measure the accuracy of choices: neither while it
            trains.

    Returns:
        How good it is.
    """
    found = {}
    steps = [
        (task, [task.held_out[index] for index in chosen])
        for task in tasks
        for chosen in make_batches(task.held_out, BATCH_TOKENS)
    ]
    sums = {task.name: [0.0, 0.0] for task in tasks}
    for task, requests in track(steps, "held-out lines") if show else steps:
        batch = Batch.of(requests, model.device)
        logits = logits_of(model, batch.ids)
        theirs = None if teacher is None else logits_of(teacher, batch.ids)
        parts = add_up(logits, theirs, batch, options.temperature or 1.0)
        for place, part in enumerate(parts):
            sums[task.name][place] += float(part)
    losses = []
    for task in tasks:
        tokens, scored = count_tokens(task.held_out)
        divergence, cross_entropy = sums[task.name][0] / tokens, sums[task.name][1] / scored
        losses.append(mix(divergence, cross_entropy, options.kd_weight))
        found[task.name] = TaskQuality(
            cross_entropy=cross_entropy,
            divergence=None if teacher is None else divergence,
            accuracy=measure_accuracy(model, task.questions) if show else None,
        )
    return Quality(tasks=found, loss=sum(losses) / len(losses))


def measure_accuracy(model: PreTrainedModel, questions: Sequence[EvalExample]) -> float | None:
    """Return how often a model finds the right choice the likeliest, in total.

    Args:
        model: The model.
        questions: Lines of choices.

    Returns:
        A fraction in [0, 1], as `edgemoe evaluate` counts it; None without questions.
    """
    if not questions:
        return None
    scores = iter(TorchScorer(model).score([r for one in questions for r in one.requests]))
    hits = 0
    for question in questions:
        found = [float(tokens.sum()) for _ in question.requests for tokens in next(scores)]
        hits += found.index(max(found)) == question.answer
    return hits / len(questions)


def logits_of(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Run a model.

    Args:
        model: The model.
        ids: int64 [rows, width].

    Returns:
        Logits [rows, width, vocabulary].
    """
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits
