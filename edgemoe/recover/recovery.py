"""Recover a checkpoint: open, train, keep what is best, and write it."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING

import torch

from edgemoe.disk import require_space
from edgemoe.models.checkpoint import Checkpoint, load_model
from edgemoe.models.saving import save_model, types_to_write
from edgemoe.recover.held_out import Quality, measure
from edgemoe.recover.memory import (
    free_bytes,
    require_memory,
    state_bytes,
    training_bytes,
    weight_bytes,
)
from edgemoe.recover.options import RecoverOptions
from edgemoe.recover.registry import find_method
from edgemoe.recover.result import Recovered, describe
from edgemoe.recover.samples import split_task
from edgemoe.recover.state import PROGRESS, TrainingState
from edgemoe.recover.teacher import check_teacher, load_teacher
from edgemoe.recover.trainer import CHECKPOINT_SECONDS, TrainingTask, train
from edgemoe.resume import publish, resumable, resume_key
from edgemoe.staging import refuse_existing, refuse_inputs_inside

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from edgemoe.models.contract import MoeModel
    from edgemoe.recover.samples import TaskSamples
    from edgemoe.tasks import TaskFile

_CHECKPOINT = "checkpoint"


def recover_checkpoint(
    path: Path,
    tasks: Sequence[TaskFile],
    output: Path,
    *,
    method: str,
    teacher: Path | None = None,
    options: RecoverOptions | None = None,
    device: str = "cpu",
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    force: bool = False,
) -> Recovered:
    """Train a checkpoint on tasks, and write the best that it was.

    Student and teacher are in memory whole, in float32. Where the training is, is kept in
    `<output>.partial`; the same call goes on from there after an interruption, and writes
    the same bytes on a CPU with as many threads.

    Args:
        path: Checkpoint directory, plain, ragged or factored.
        tasks: What to train on; each has an equal share of the tokens.
        output: Checkpoint directory to write.
        method: One of `edgemoe.recover.registry.METHODS`.
        teacher: Checkpoint to distil from, with experts or dense.
        options: How to train; the defaults where it is None.
        device: `cpu` or `cuda:N`.
        checkpoint_seconds: How long a run may lose when it is killed.
        force: Whether `output`, and unfinished work of another call, may be replaced.

    Returns:
        What it came to.

    Raises:
        RecoveryError: The method or an option is out of range, the teacher does not fit the
            model, or memory is too small.
        CheckpointError: A checkpoint is missing, unsafe or inconsistent.
        TaskFileError: A task has too few lines or tokens.
        OutputError: The output exists, or the disk refuses.
    """
    checkpoints = [path] if teacher is None else [path, teacher]
    refuse_existing(output, force=force, directory=True, resumes=True)
    refuse_inputs_inside(output, *checkpoints, *(task.path for task in tasks))
    chosen = find_method(method)
    settled = chosen.settle(options or RecoverOptions(), has_teacher=teacher is not None)
    opened = [Checkpoint(checkpoint) for checkpoint in checkpoints]
    samples = _cut(opened[0], tasks, settled)
    if teacher is not None:
        check_teacher(opened[1], opened[0])
    weights, free = weight_bytes(*checkpoints), free_bytes(device)
    require_memory(weights, free, " and ".join(map(str, checkpoints)))
    key = resume_key(
        "recover",
        opened[0],
        teacher=opened[1] if teacher is not None else None,
        tasks={task.name: task for task in tasks},
        method=method,
        options=settled.to_dict(),
        device=torch.device(device).type,
        tokenizer=opened[0].tokenizer_sha256,
        versions={"peft": version("peft")},
    )
    with resumable(output, key, PROGRESS, force=force) as work:
        for number, checkpoint in enumerate(opened):
            checkpoint.hashes.remember(work, f"hashes-{number}.json")
        sha256 = [one.hashes.fingerprint("read the checkpoints") for one in opened]
        student = load_model(opened[0])
        student.model.to(device)
        master = None if teacher is None else load_teacher(opened[1]).to(device)
        training = chosen.prepare(student, settled)
        width, length = student.config.vocab_size, settled.sequence_length
        needed = weights + training_bytes(training, width, length)
        require_memory(needed, free, f"training with {method}")
        require_space(work.path, weight_bytes(path) + state_bytes(training))
        state = TrainingState(work)
        if not state.progress:
            found = measure(student.model, master, samples, settled, show=True)
            state.save({"step": 0, "stale": 0, "before": found.to_dict()})
        training.begin()
        training_task = TrainingTask(
            method=chosen,
            options=settled,
            student=student,
            teacher=master,
            tasks=samples,
            training=training,
            before=Quality.from_dict(state.progress["before"]),
        )
        run = chosen.run or train
        seconds = run(training_task, state, checkpoint_seconds=checkpoint_seconds)
        written, after, best = _take_best(student, training_task, state, opened[0])
        told = Recovered(
            method=method,
            family=written.family,
            experts_per_layer=written.experts_per_layer,
            before=training_task.before,
            after=after,
            best_step=best,
            steps=int(state.progress["step"]),
            ended=str(state.progress["ended"]),
            trained_parameters=sum(p.numel() for p in training.parameters.values()),
            tasks=samples,
            seconds_per_step=seconds,
            unit="step" if chosen.run is None else "layer",
        )
        directory = work.empty_directory(_CHECKPOINT)
        written.model.to("cpu")
        provenance = describe(told, settled, tasks, sha256, student.provenance)
        save_model(written, directory, source=path, provenance=provenance)
        publish(directory, output, force=force)
    return told


def _cut(
    checkpoint: Checkpoint, tasks: Sequence[TaskFile], options: RecoverOptions
) -> tuple[TaskSamples, ...]:
    """Cut the tasks into sequences that the model takes."""
    return tuple(
        split_task(
            task,
            checkpoint.tokenizer,
            held_out_fraction=options.held_out_fraction,
            max_length=min(options.sequence_length, checkpoint.max_length),
            max_tokens=options.max_tokens,
        )
        for task in tasks
    )


def _take_best(
    student: MoeModel, training_task: TrainingTask, state: TrainingState, checkpoint: Checkpoint
) -> tuple[MoeModel, Quality, int]:
    """Return what is to be written, how good it is, and the step that it is from."""
    best = int(state.progress.get("best_step", 0))
    if best:
        state.load_best(training_task.training.parameters)
        training_task.training.finish()
        round_to_stored(student)
        after = measure(
            student.model,
            training_task.teacher,
            training_task.tasks,
            training_task.options,
            show=True,
        )
        if after.loss < training_task.before.loss:
            return student, after, best
    # Nothing helped, or not enough to survive the rounding of what is stored.
    return load_model(checkpoint), training_task.before, 0


@torch.no_grad()
def round_to_stored(model: MoeModel) -> None:
    """Round weights as `edgemoe.models.saving.save_model` does.

    Args:
        model: The model; it then equals what is loaded from the checkpoint that it is saved as.
    """
    types = types_to_write(model)
    for name, tensor in model.model.state_dict().items():
        if name in types:
            tensor.copy_(tensor.to(types[name]).to(tensor.dtype))
