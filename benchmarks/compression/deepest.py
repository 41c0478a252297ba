"""How deep can a task be cut when recovery is not stinted? One method, all of the task's text.

The method chooses what stays, least squares repair it on every calibration line that there is,
and LoRA trains what comes of that. The unpruned model gets the same training beside it, though
without a teacher, which would be itself: whoever trains on a task's text learns the task,
whether anything was cut or not, and a cut that is called free because of that is not.

Run it from the repository's root, with the demo's model and a folder that
benchmarks/reference_moe/corpus.py wrote::

    python -m benchmarks.compression.deepest demo/moe --tasks demo/domains --work deepest

Markdown goes to stdout, progress to stderr; --work keeps what is finished. Training takes most
of the time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from benchmarks.commands import Commands
from benchmarks.tables import megabytes, show_drop, show_score, write_table
from benchmarks.task_options import on_one_task

if TYPE_CHECKING:
    from pathlib import Path

    from edgemoe.evaluate.evaluation import Evaluation


@click.command()
@on_one_task
@click.option("--method", default="heapr", show_default=True)
@click.option("--keep", "keeps", type=float, multiple=True, default=(0.75, 0.5))
@click.option("--calibration-tokens", default=32768, show_default=True)
@click.option("--held-out-tokens", default=12288, show_default=True)
@click.option("--steps", default=48, show_default=True, help="Of LoRA, 1024 tokens each.")
def main(
    model: Path,
    tasks: Path,
    task: str,
    work: Path,
    method: str,
    keeps: tuple[float, ...],
    calibration_tokens: int,
    held_out_tokens: int,
    steps: int,
    threads: int,
) -> None:
    """Cut MODEL, and win back what can be won."""
    commands = Commands(work, threads)
    lines = tasks / f"{task}.train.jsonl"
    stats = commands.calibrate(model, task, lines, calibration_tokens)
    squares = ("--method", "least-squares", "--max-tokens", calibration_tokens)
    trained = ("--method", "lora", "--steps", steps, "--batch-tokens", 1024)
    held_out = tasks / f"{task}.test.jsonl"
    before = commands.judge("unpruned", model, held_out, held_out_tokens)
    rows = [["all", "none", megabytes(model), show_score(before), "", ""]]
    trained_alike: list[Evaluation] = []

    def judge(name: str, keep: str, recovery: str) -> None:
        score = commands.judge(name, work / name, held_out, held_out_tokens)
        trained_alike[:] = trained_alike or [score]
        size, drops = megabytes(work / name), (before, trained_alike[0])
        beside = [show_drop(other, score) for other in drops]
        rows.append([keep, recovery, size, show_score(score), *beside])

    teacher = ("--teacher", model, "--task", f"{task}={lines}")
    commands.make("unpruned-lora", "recover", model, "--task", f"{task}={lines}", *trained)
    judge("unpruned-lora", "all", f"LoRA without a teacher, {steps} steps")
    for keep in keeps:
        name, shown = f"{method}-{keep:g}", f"{method}, {keep:g}"
        asked = ("--stats", stats, "--task", task, "--method", method)
        commands.make(f"{name}.json", "prune", model, *asked, "--keep", keep)
        commands.make(name, "apply", model, "--plan", work / f"{name}.json")
        judge(name, shown, "none")
        commands.make(f"{name}-squares", "recover", work / name, *teacher, *squares)
        judge(f"{name}-squares", shown, "least squares")
        repaired = work / f"{name}-squares"
        commands.make(f"{name}-lora", "recover", repaired, *teacher, *trained)
        judge(f"{name}-lora", shown, f"least squares, then LoRA, {steps} steps")
    heading = ["keep", "recovery", "MB", "perplexity [95%]", "rise over unpruned [95%]"]
    write_table([*heading, "over unpruned with LoRA [95%]"], rows)


if __name__ == "__main__":
    main()
