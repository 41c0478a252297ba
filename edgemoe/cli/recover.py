"""`edgemoe recover`: training that wins back what compression cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from edgemoe.api.recover import recover as train
from edgemoe.cli.options import (
    PATH,
    THREADS,
    command,
    force_option,
    options_of,
    output_option,
    report,
    reporting,
)
from edgemoe.tasks import split_task_arguments

if TYPE_CHECKING:
    from pathlib import Path

    from edgemoe.recover.result import Recovered

option = options_of(train)


@command(
    "edgemoe recover moe-code --teacher demo/moe --task code=demo/tasks/code.train.jsonl"
    " --method router-kd -o moe-code-kd",
)
@click.argument("model", type=PATH)
@option(
    "--task",
    "tasks",
    multiple=True,
    metavar="NAME=FILE",
    help="Training data of a task, JSON Lines. Repeatable.",
)
@option(
    "--method",
    metavar="M",
    help="least-squares, router-kd, lora, lora+router-kd or uncurl.",
)
@option(
    "--teacher",
    type=PATH,
    metavar="MODEL",
    help="The checkpoint before compression; lora and uncurl can do without.",
)
@output_option("Checkpoint directory")
@option("--steps", type=int, metavar="N", help="Optimizer steps at most.")
@option(
    "--learning-rate",
    type=float,
    metavar="F",
    help="Highest learning rate.  [default: 5e-5 for router-kd, 2e-4 with lora, 1e-4 for "
    "uncurl]",
)
@option(
    "--batch-tokens",
    type=int,
    metavar="N",
    help="Tokens of a step, of all tasks together.",
)
@option(
    "--sequence-length",
    type=int,
    metavar="N",
    help="Longest sequence in tokens; texts are cut at 512 at most.",
)
@option("--max-tokens", type=int, metavar="N", help="Train on at most so many tokens per task.")
@option(
    "--held-out",
    type=float,
    metavar="F",
    help="Fraction of each task's examples that validate the training, (0, 0.5].",
)
@option(
    "--kd-weight",
    type=float,
    metavar="F",
    help="Weight of the distillation loss (divergence from the teacher), [0, 1]; the rest is "
    "the task's cross-entropy.  [default: 1 for lora+router-kd, else 0.5 with a teacher]",
)
@option(
    "--temperature",
    type=float,
    metavar="T",
    help="Temperature of the distillation.  [default: 1]",
)
@option("--rank", type=int, metavar="R", help="Rank of LoRA adapters.  [default: 16]")
@option("--alpha", type=float, metavar="A", help="Scale of LoRA adapters.  [default: 2 * rank]")
@option(
    "--router-steps",
    type=int,
    metavar="N",
    help="Steps of uncurl in which routers train alone.  [default: a quarter]",
)
@option("--seed", type=int, metavar="N", help="Of the order of examples and what is drawn.")
@option("--threads", **THREADS)
@option("--device", metavar="cpu|cuda|cuda:N|auto", help="Where both models compute.")
@force_option
@reporting
def recover(as_json: bool, tasks: tuple[str, ...], **given: Any) -> None:
    """Win back on tasks what pruning, merging or factoring cost MODEL.

    Distils from the checkpoint before compression, or trains on the tasks. Some examples of
    each task are held out: they measure the loss before and after, and which step is kept.
    Where nothing is better than MODEL itself, it is written as it is. MODEL and the teacher are
    in memory at once, as float32. When it is interrupted, the same command goes on.
    """
    recovered = train(tasks=split_task_arguments(tasks), **given)
    report(
        {"output": given["output"], **recovered.to_dict()},
        f"{given['output']}: {_describe(recovered, given['model'])}",
        as_json=as_json,
    )


def _describe(recovered: Recovered, model: Path) -> str:
    tasks = recovered.to_dict()["tasks"]
    noun = recovered.unit
    if not recovered.best_step:
        return (
            f"{model} as it is, because no {noun} of {recovered.method} was better on the "
            f"held-out lines (loss {recovered.before.loss:.4g}; ended after {noun} "
            f"{recovered.steps}: {recovered.ended})"
        )
    done = (
        f"best after step {recovered.best_step} of {recovered.steps}"
        if noun == "step"
        else f"{recovered.best_step} of {recovered.steps} layers changed"
    )
    scores = ", ".join(
        f"{metric} {name} {task[f'{metric}_before']:.4g} -> {task[f'{metric}_after']:.4g}"
        for name, task in tasks.items()
        for metric in ("accuracy", "perplexity")
        if task[f"{metric}_before"] is not None
    )
    return (
        f"{recovered.method}, {done}; held-out loss {recovered.before.loss:.4g} -> "
        f"{recovered.after.loss:.4g}, {scores}"
    )
