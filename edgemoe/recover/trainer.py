"""The training itself: AdamW, judged by held-out lines, interrupted and gone on with."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from edgemoe.evaluate.batches import BATCH_TOKENS, make_batches
from edgemoe.progress import telling
from edgemoe.recover.held_out import logits_of, measure, mix
from edgemoe.recover.losses import Batch, add_up, count_tokens
from edgemoe.recover.samples import Batches

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

    from edgemoe.evaluate.scorer import Request
    from edgemoe.models.contract import MoeModel
    from edgemoe.recover.held_out import Quality
    from edgemoe.recover.method import RecoveryMethod, Training
    from edgemoe.recover.options import RecoverOptions
    from edgemoe.recover.samples import TaskSamples
    from edgemoe.recover.state import TrainingState

MEASUREMENTS = 10
PATIENCE = 5
CHECKPOINT_SECONDS = 300.0
_WARMUP_FRACTION = 0.05
_LARGEST_NORM = 1.0


@dataclass(frozen=True, kw_only=True)
class TrainingTask:
    """All that a training is made of.

    Attributes:
        method: The method.
        options: Settled options.
        student: The student.
        teacher: The teacher, if any.
        tasks: What is trained on, and what judges it.
        training: What trains.
        before: How good the student was before anything was changed.
    """

    method: RecoveryMethod
    options: RecoverOptions
    student: MoeModel
    teacher: PreTrainedModel | None
    tasks: Sequence[TaskSamples]
    training: Training
    before: Quality

    @property
    def model(self) -> PreTrainedModel:
        """The student as transformers has it."""
        return self.student.model


def train(
    training_task: TrainingTask,
    state: TrainingState,
    *,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
) -> float | None:
    """Train to the end, from where the state is.

    The loss on the held-out lines is measured ten times, the last time after the last step; the
    state keeps the parameters of the lowest, if any is lower than that before the training.
    After five measurements without a new low, or a loss that is no number, the training ends.

    Args:
        training_task: What to train, how, and on what.
        state: Where the training is; at the end its progress says `ended`.
        checkpoint_seconds: How long a run may lose when it is killed.

    Returns:
        Seconds per step, measurements included; None where no step was left.
    """
    first, begun = state.progress["step"], time.monotonic()
    _Run(training_task, state, checkpoint_seconds).finish()
    taken = state.progress["step"] - first
    return (time.monotonic() - begun) / taken if taken else None


def learning_rate_factor(step: int, steps: int) -> float:
    """Return the share of the highest learning rate: a linear rise, then half a cosine.

    Args:
        step: Counted from 0, in [0, steps).
        steps: Steps of the phase; the first 5%, at least one, belong to the rise.

    Returns:
        In (0, 1].
    """
    rise = max(1, round(_WARMUP_FRACTION * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise + 1) / (steps - rise + 1)))


class _Run:
    """One run of a training, possibly over what an earlier one reached."""

    def __init__(
        self, training_task: TrainingTask, state: TrainingState, seconds: float
    ) -> None:
        self._task = training_task
        self._state = state
        self._seconds = seconds
        self._steps = training_task.training.steps
        self._every = -(-self._steps // MEASUREMENTS)
        self._device = training_task.model.device
        by_rate: dict[float, list[torch.nn.Parameter]] = {}
        for name, parameter in training_task.training.parameters.items():
            by_rate.setdefault(training_task.training.rates.get(name, 1.0), []).append(
                parameter
            )
        assert training_task.options.learning_rate is not None
        self._optimizer = torch.optim.AdamW(
            [
                {"params": group, "highest": rate * training_task.options.learning_rate}
                for rate, group in by_rate.items()
            ],
            weight_decay=training_task.method.weight_decay,
            foreach=False,
        )
        state.load(training_task.training.parameters, self._optimizer)

    def finish(self) -> None:
        """Take all steps that are left."""
        progress = dict(self._state.progress)
        if "ended" in progress:
            return
        options, first = self._task.options, int(progress["step"])
        batches = Batches(self._task.tasks, options.batch_tokens, options.seed)
        for _ in range(first):
            batches.draw()
        saved = time.monotonic()
        with telling(self._steps - first, "recover") as advance:
            for step in range(first, self._steps):
                loss = self._take_step(step, batches.draw())
                progress["step"] = step + 1
                is_measured = (step + 1) % self._every == 0 or step + 1 == self._steps
                if not math.isfinite(loss):
                    progress["ended"] = f"the loss of step {step + 1} was no number"
                elif is_measured:
                    self._judge(progress)
                is_due = is_measured or time.monotonic() - saved >= self._seconds
                if is_due or "ended" in progress:
                    parameters = self._task.training.parameters
                    self._state.save(progress, parameters, self._optimizer)
                    saved = time.monotonic()
                advance(f"loss {loss:.4f}")
                if "ended" in progress:
                    return

    def _take_step(self, step: int, requests: list[Request]) -> float:
        training_task = self._task
        phase, position = training_task.training.locate(step)
        for name, parameter in training_task.training.parameters.items():
            parameter.requires_grad_(name in phase.names)
        factor = learning_rate_factor(position, phase.steps)
        for group in self._optimizer.param_groups:
            group["lr"] = factor * group["highest"]
        loss = self._add_gradients(requests)
        trained = [p for p in training_task.training.parameters.values() if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(trained, _LARGEST_NORM, foreach=False)
        if math.isfinite(loss) and bool(norm.isfinite()):
            self._optimizer.step()
        else:
            loss = math.nan
        self._optimizer.zero_grad(set_to_none=True)
        return loss

    def _add_gradients(self, requests: list[Request]) -> float:
        """Sum the gradients of a step, a few sequences at a time, and return its loss."""
        training_task, options = self._task, self._task.options
        tokens, scored = count_tokens(requests)
        loss = 0.0
        for chosen in make_batches(requests, BATCH_TOKENS):
            batch = Batch.of([requests[index] for index in chosen], self._device)
            theirs = None
            if training_task.teacher is not None:
                with torch.no_grad():
                    theirs = logits_of(training_task.teacher, batch.ids)
            sums = add_up(
                logits_of(training_task.model, batch.ids),
                theirs,
                batch,
                options.temperature or 1.0,
            )
            part: Any = mix(
                sums.divergence / tokens,  # type: ignore[arg-type]  # tensors mix as numbers do
                sums.cross_entropy / scored,  # type: ignore[arg-type]
                options.kd_weight,
            )
            part.backward()
            loss += float(part.detach())
        return loss

    def _judge(self, progress: dict[str, Any]) -> None:
        """Measure the held-out lines, and keep the parameters if they are the best so far."""
        training_task = self._task
        loss = measure(
            training_task.model,
            training_task.teacher,
            training_task.tasks,
            training_task.options,
        ).loss
        if not math.isfinite(loss):
            progress["ended"] = f"the held-out loss of step {progress['step']} was no number"
            return
        progress["curve"] = [*progress.get("curve", []), [progress["step"], loss]]
        # A training that starts from noise may need long until it beats what was there.
        is_low = loss < progress.get("low", math.inf)
        progress["stale"] = 0 if is_low else progress["stale"] + 1
        if is_low:
            progress["low"] = loss
            if loss < training_task.before.loss:
                step = int(progress["step"])
                progress["best_file"] = self._state.save_best(
                    step, training_task.training.parameters
                )
                progress["best_step"] = step
        if progress["step"] == self._steps:
            progress["ended"] = "all steps"
        elif progress["stale"] == PATIENCE:
            progress["ended"] = (
                f"no gain since step {progress['step'] - PATIENCE * self._every}"
            )
