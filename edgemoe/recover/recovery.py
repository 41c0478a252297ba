"""Recover a checkpoint: open, train, keep what is best, and write it."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING

import torch

from edgemoe.models.checkpoint import load_model, load_tokenizer, read_config
from edgemoe.models.fingerprint import FileHashes, hash_file
from edgemoe.models.saving import float32_names, save_model
from edgemoe.progress import track
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
from edgemoe.recover.trainer import CHECKPOINT_SECONDS, Lesson, train
from edgemoe.resume import publish, resumable
from edgemoe.staging import recover as put_back
from edgemoe.staging import refuse_existing, refuse_inputs_inside, require_space
from edgemoe.versions import library_versions

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tokenizers import Tokenizer

    from edgemoe.models.contract import MoeModel
    from edgemoe.recover.samples import TaskSamples
    from edgemoe.resume import WorkDirectory
    from edgemoe.tasks import TaskFile

_CHECKPOINT = "checkpoint"
_HASHES = "hashes.json"


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
    put_back(output)
    refuse_existing(output, force=force, directory=True)
    checkpoints = [path] if teacher is None else [path, teacher]
    refuse_inputs_inside(output, *checkpoints, *(task.path for task in tasks))
    chosen = find_method(method)
    settled = chosen.settle(options or RecoverOptions(), has_teacher=teacher is not None)
    tokenizer = load_tokenizer(path)
    samples = _cut(path, tasks, tokenizer, settled)
    if teacher is not None:
        check_teacher(teacher, path, tokenizer)
    weights, free = weight_bytes(*checkpoints), free_bytes(device)
    require_memory(weights, free, " and ".join(map(str, checkpoints)))
    hashes = [FileHashes(checkpoint) for checkpoint in checkpoints]
    key = {
        "command": "recover",
        "checkpoint": hashes[0].stamps(),
        "teacher": hashes[1].stamps() if teacher is not None else None,
        "tasks": {task.name: task.sha256 for task in tasks},
        "method": method,
        "options": settled.to_dict(),
        "device": torch.device(device).type,
        "tokenizer": hash_file(path / "tokenizer.json"),
        "versions": {**library_versions(), "peft": version("peft")},
    }
    with resumable(output, key, PROGRESS, force=force) as work:
        sha256 = _fingerprint(hashes, work)
        student = load_model(path)
        student.model.to(device)
        master = None if teacher is None else load_teacher(teacher).to(device)
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
        lesson = Lesson(
            method=chosen,
            options=settled,
            student=student,
            teacher=master,
            tasks=samples,
            training=training,
            before=Quality.from_dict(state.progress["before"]),
        )
        run = chosen.run or train
        seconds = run(lesson, state, checkpoint_seconds=checkpoint_seconds)
        written, after, best = _take_best(student, lesson, state, path)
        told = Recovered(
            method=method,
            family=written.family,
            experts_per_layer=written.experts_per_layer,
            before=lesson.before,
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
    path: Path, tasks: Sequence[TaskFile], tokenizer: Tokenizer, options: RecoverOptions
) -> tuple[TaskSamples, ...]:
    """Cut the tasks into sequences that the model takes."""
    _, config = read_config(path)
    longest = int(getattr(config, "max_position_embeddings", None) or 2**31)
    return tuple(
        split_task(
            task,
            tokenizer,
            held_out_fraction=options.held_out_fraction,
            max_length=min(options.sequence_length, longest),
            max_tokens=options.max_tokens,
        )
        for task in tasks
    )


def _fingerprint(hashes: Sequence[FileHashes], work: WorkDirectory) -> list[str]:
    """Hash the checkpoints, as far as an earlier run has not."""
    known = work.read(_HASHES) or {}
    for number, one in enumerate(hashes):
        one.recall(known.get(str(number), {}))
    files = [(one, file) for one in hashes for file in one.files]
    for one, file in track(files, "read the checkpoints"):
        one.advance(file)
    work.write(_HASHES, {str(number): one.as_dict() for number, one in enumerate(hashes)})
    return [one.fingerprint() for one in hashes]


def _take_best(
    student: MoeModel, lesson: Lesson, state: TrainingState, path: Path
) -> tuple[MoeModel, Quality, int]:
    """Return what is to be written, how good it is, and the step that it is from."""
    best = int(state.progress.get("best_step", 0))
    if best:
        state.load_best(lesson.training.parameters)
        lesson.training.finish()
        round_to_stored(student)
        after = measure(student.model, lesson.teacher, lesson.tasks, lesson.options, show=True)
        if after.loss < lesson.before.loss:
            return student, after, best
    # Nothing helped, or not enough to survive the rounding of what is stored.
    return load_model(path), lesson.before, 0


@torch.no_grad()
def round_to_stored(model: MoeModel) -> None:
    """Round weights as `edgemoe.models.saving.save_model` does.

    Args:
        model: The model; it then equals what is loaded from the checkpoint that it is saved as.
    """
    keep = float32_names(model)
    for name, tensor in model.model.state_dict().items():
        if tensor.is_floating_point() and name not in keep:
            tensor.copy_(tensor.to(model.stored_dtype).to(tensor.dtype))
