"""``edgemoe recover``: training that wins back what compression cost."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from edgemoe.cli.extras import needs
from edgemoe.cli.options import PATH, force_option, output_option, report, reporting

if TYPE_CHECKING:
    from pathlib import Path

    from edgemoe.recover.result import Recovered


@click.command()
@click.argument("model", type=PATH)
@click.option(
    "--task", "tasks", multiple=True, required=True, metavar="NAME=FILE", help="Repeatable."
)
@click.option(
    "--method",
    required=True,
    metavar="M",
    help="least-squares, router-kd, lora, lora+router-kd or uncurl.",
)
@click.option(
    "--teacher",
    type=PATH,
    metavar="MODEL",
    help="The checkpoint before compression; lora and uncurl can do without.",
)
@output_option("Checkpoint directory")
@click.option("--steps", type=int, default=200, show_default=True, metavar="N")
@click.option(
    "--learning-rate",
    type=float,
    metavar="F",
    help="Highest rate.  [default: 5e-5 for router-kd, 2e-4 with lora, 1e-4 for uncurl]",
)
@click.option(
    "--batch-tokens",
    type=int,
    default=2048,
    show_default=True,
    metavar="N",
    help="Tokens of a step, of all tasks together.",
)
@click.option(
    "--sequence-length",
    type=int,
    default=512,
    show_default=True,
    metavar="N",
    help="Longest sequence in tokens; texts are cut at 512 at most.",
)
@click.option(
    "--max-tokens", type=int, metavar="N", help="Train on at most so many tokens per task."
)
@click.option(
    "--held-out",
    type=float,
    default=0.25,
    show_default=True,
    metavar="F",
    help="Share of each task's lines that judge the training, (0, 0.5].",
)
@click.option(
    "--kd-weight",
    type=float,
    metavar="F",
    help="Share of the teacher's divergence in the loss, [0, 1]; the rest is the task's "
    "cross-entropy.  [default: 1 for lora+router-kd, else 0.5 with a teacher]",
)
@click.option("--temperature", type=float, metavar="T", help="Of the divergence.  [default: 1]")
@click.option("--rank", type=int, metavar="R", help="Of adapters.  [default: 16]")
@click.option("--alpha", type=float, metavar="A", help="Their scale.  [default: 2 * rank]")
@click.option(
    "--router-steps",
    type=int,
    metavar="N",
    help="Steps of uncurl in which routers train alone.  [default: a quarter]",
)
@click.option("--seed", type=int, default=0, show_default=True, metavar="N")
@click.option(
    "--threads",
    type=click.IntRange(1),
    metavar="N",
    help="CPU threads; the last bits of the result depend on it.",
)
@click.option(
    "--device",
    default="cpu",
    show_default=True,
    metavar="cpu|cuda|cuda:N|auto",
    help="Where both models compute.",
)
@force_option
@reporting
def recover(
    model: Path,
    tasks: tuple[str, ...],
    method: str,
    teacher: Path | None,
    output: Path,
    steps: int,
    learning_rate: float | None,
    batch_tokens: int,
    sequence_length: int,
    max_tokens: int | None,
    held_out: float,
    kd_weight: float | None,
    temperature: float | None,
    rank: int | None,
    alpha: float | None,
    router_steps: int | None,
    seed: int,
    threads: int | None,
    device: str,
    force: bool,
    as_json: bool,
) -> None:
    """Win back on tasks what pruning, merging or factoring cost MODEL.

    Some lines of each task are held out: they tell the loss before and after, and what of the
    training is kept. Where nothing is better than MODEL itself, it is written as it is. MODEL
    and the teacher are in memory at once, as float32. When it is interrupted, the same command
    goes on.
    """
    needs("export")
    import torch

    from edgemoe.models.device import device_here
    from edgemoe.recover.options import RecoverOptions
    from edgemoe.recover.recovery import recover_checkpoint
    from edgemoe.tasks import load_tasks

    options = RecoverOptions(
        steps=steps,
        learning_rate=learning_rate,
        batch_tokens=batch_tokens,
        sequence_length=sequence_length,
        max_tokens=max_tokens,
        held_out_fraction=held_out,
        seed=seed,
        kd_weight=kd_weight,
        temperature=temperature,
        rank=rank,
        alpha=alpha,
        router_steps=router_steps,
    )
    if threads is not None:
        torch.set_num_threads(threads)
    recovered = recover_checkpoint(
        model,
        load_tasks(tasks),
        output,
        method=method,
        teacher=teacher,
        options=options,
        device=device_here(device),
        force=force,
    )
    report(
        {"output": output, **recovered.to_dict()},
        f"{output}: {_tell(recovered, model)}",
        as_json=as_json,
    )


def _tell(recovered: Recovered, model: Path) -> str:
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
    perplexities = ", ".join(
        f"{name} {task['perplexity_before']:.4g} -> {task['perplexity_after']:.4g}"
        for name, task in tasks.items()
    )
    return (
        f"{recovered.method}, {done}; held-out loss {recovered.before.loss:.4g} -> "
        f"{recovered.after.loss:.4g}, perplexity {perplexities}"
    )
