"""Train a compressed checkpoint, so that it wins back what compression cost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edgemoe.api.arguments import (
    as_float,
    as_path,
    check_at_least_one,
    files_of,
    read_tasks,
    task_paths,
)
from edgemoe.api.checks import check_checkpoint, check_output
from edgemoe.api.extras import needs
from edgemoe.api.method_names import RECOVERY, check_name
from edgemoe.api.running import running
from edgemoe.models.device import check_device
from edgemoe.recover.options import RecoverOptions
from edgemoe.staging import reserved

if TYPE_CHECKING:
    from edgemoe.api.arguments import StrPath, Tasks
    from edgemoe.progress import OnProgress
    from edgemoe.recover.result import Recovered


def recover(
    model: StrPath,
    tasks: Tasks,
    method: str,
    output: StrPath,
    *,
    teacher: StrPath | None = None,
    steps: int = 200,
    learning_rate: float | None = None,
    batch_tokens: int = 2048,
    sequence_length: int = 512,
    max_tokens: int | None = None,
    held_out: float = 0.25,
    kd_weight: float | None = None,
    temperature: float | None = None,
    rank: int | None = None,
    alpha: float | None = None,
    router_steps: int | None = None,
    seed: int = 0,
    threads: int | None = None,
    device: str = "cpu",
    force: bool = False,
    on_progress: OnProgress | None = None,
) -> Recovered:
    """Win back on tasks what pruning, merging or factoring cost a checkpoint.

    Some examples of each task are held out: they measure the loss before and after, and decide
    what of the training is kept. Where nothing is better than the model itself, that is written
    as it is. Model and teacher are in memory at once, in float32. A checkpoint directory is
    written; `<output>.partial` keeps the state of the training, and after an interruption the
    same call goes on.

    Sources: `router-kd` https://arxiv.org/abs/2603.02217, `lora`
    https://arxiv.org/abs/2106.09685 as in https://arxiv.org/abs/2411.01016, `uncurl`
    https://arxiv.org/abs/2409.01483; `edgemoe.recover.least_squares` names those of
    `least-squares`.

    Args:
        model: Checkpoint directory: plain, ragged or factored.
        tasks: Task files by name, or tasks that are loaded; each has an equal share of the
            tokens.
        method: `least-squares`, `router-kd`, `lora`, `lora+router-kd` or `uncurl`.
        output: Checkpoint directory to write.
        teacher: The checkpoint before it was compressed; `lora` and `uncurl` can do without.
        steps: Optimizer steps at most, in [1, inf).
        learning_rate: Highest learning rate, in (0, 1]; None takes 5e-5 for `router-kd`, 2e-4
            with `lora`, 1e-4 for `uncurl`.
        batch_tokens: Tokens of a step, of all tasks together, in [2, inf).
        sequence_length: Longest sequence in tokens, in [2, 2048]; texts are cut at 512.
        max_tokens: Tokens of each task to train on at most, in [2, inf); None trains on all.
        held_out: Fraction of each task's examples that training never sees, in (0, 0.5].
        kd_weight: Fraction of the teacher's divergence in the loss, in [0, 1]; the rest is the
            task's cross-entropy. None takes 1 for `lora+router-kd`, else 0.5 with a teacher.
        temperature: What logits are divided by in the divergence, in (0, inf); None takes 1.
        rank: Rank of the adapters, in [1, inf); None takes 16.
        alpha: Their scale, in (0, inf): they add `alpha / rank` times their product; None
            takes `2 * rank`.
        router_steps: Steps of `uncurl` in which routers train alone, in [1, steps); None takes
            a quarter.
        seed: Of the order of the examples and of what is drawn, in [0, 2**31).
        threads: CPU threads, in [1, inf); None leaves what they are.
        device: Where both models compute: `cpu`, `cuda`, `cuda:N` or `auto`.
        force: Whether `output`, and unfinished work of another call, may be replaced.
        on_progress: Called with each `edgemoe.progress.ProgressEvent`; None draws a bar
            where stderr is a terminal.

    Returns:
        Losses (nats per token) and perplexities on the held-out examples before and after, and
        how far the training went.

    Raises:
        ArgumentError: `threads` is out of range.
        RecoveryError: The method or an option is out of range, the teacher does not fit the
            model, or memory is too small.
        TaskFileError: A task file breaks the format, or has too few examples or tokens.
        CheckpointError: A checkpoint is missing, unsafe or inconsistent.
        FamilyError: The family is not supported.
        OutputError: `output` exists and `force` is false, or the disk refuses.
        EdgemoeError: There is no such device.
        MissingDependencyError: The extra `export` is not installed.

    Example:
        >>> from edgemoe import recover
        >>> tasks = {"code": "code.jsonl"}
        >>> found = recover("moe-code", tasks, "least-squares", "better", teacher="moe")
        >>> won = found.before.loss - found.after.loss
    """
    check_at_least_one(threads=threads)
    options = RecoverOptions(
        steps=steps,
        learning_rate=as_float(learning_rate),
        batch_tokens=batch_tokens,
        sequence_length=sequence_length,
        max_tokens=max_tokens,
        held_out_fraction=float(held_out),
        seed=seed,
        kd_weight=as_float(kd_weight),
        temperature=as_float(temperature),
        rank=rank,
        alpha=as_float(alpha),
        router_steps=router_steps,
    )
    check_device(device)
    path, target = Path(model), Path(output)
    needs("export")
    check_name(method, RECOVERY)
    inputs = files_of(path, teacher, *task_paths(tasks).values())
    check_output(target, *inputs, force=force, directory=True)
    for checkpoint in files_of(path, teacher):
        check_checkpoint(checkpoint)
    loaded = read_tasks(tasks, path)
    with (
        running("export", threads=threads, on_progress=on_progress),
        reserved(target, force=force, directory=True, resumes=True),
    ):
        from edgemoe.models.device import device_here
        from edgemoe.recover.recovery import recover_checkpoint

        return recover_checkpoint(
            path,
            loaded,
            target,
            method=method,
            teacher=as_path(teacher),
            options=options,
            device=device_here(device),
            force=force,
        )
