"""Whether harder tasks, and harder tokens, get more experts, where one price holds for all.

One policy is decided on the lines of all tasks together; held-out lines of each task follow it.
Experts per token stand beside how hard the task is, the perplexity of the router's own top-k,
and are told for the thirds of a task's tokens whose next token was foreseen best and worst. Run
it from the repository's root, with the demo's model and a folder that
benchmarks/reference_moe/corpus.py wrote::

    python -m benchmarks.adaptive_k.harder_tasks demo/moe --tasks demo/domains --work policies

Markdown goes to stdout, progress to stderr; --work keeps what is finished, and may be that of
policies.py.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click
import numpy as np
import torch

from benchmarks.adaptive_k.trial import Trial, ask_about
from benchmarks.tables import show_drop, show_score, write_table
from benchmarks.task_options import on_several_tasks
from edgemoe.allocate.registry import allocate, read_options
from edgemoe.allocate.rollout import reward_of
from edgemoe.allocate.usage import count_experts
from edgemoe.k_policy import KPolicy
from edgemoe.models import load_model, load_tokenizer
from edgemoe.models.k_policy import following
from edgemoe.staging import staged_file
from edgemoe.tasks import TaskFile

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


@click.command()
@on_several_tasks
@click.option("--policy", default="fisher", show_default=True)
@click.option("--mean-k", default=3.9, show_default=True)
@click.option("--tokens", default=16384, show_default=True, help="Of all tasks together.")
@click.option("--held-out-tokens", default=4096, show_default=True)
def main(
    model: Path,
    tasks: Path,
    names: tuple[str, ...],
    work: Path,
    policy: str,
    mean_k: float,
    tokens: int,
    held_out_tokens: int,
    threads: int,
) -> None:
    """Share experts of MODEL out among tasks."""
    torch.set_num_threads(threads)
    work.mkdir(parents=True, exist_ok=True)
    opened, tokenizer = load_model(model), load_tokenizer(model)
    together = "-".join(names)
    lines = mix(tasks, names, work / f"{together}.train.jsonl")
    name, _, options = policy.partition(":")
    key = "-".join(filter(None, (name, f"{mean_k}", options, "of", together)))
    file = work / f"{key}.json"
    if not file.exists():
        click.echo(key, err=True)
        oracle = ask_about(opened, tokenizer, lines, tokens)
        given = read_options(name, options.split(",") if options else [])
        made = allocate(oracle, name, task=together, mean_k=mean_k, options=given)
        with staged_file(file, force=True) as staged:
            staged.write_text(json.dumps(made.to_json()) + "\n", encoding="utf-8")
    decided = KPolicy.from_json(json.loads(file.read_text(encoding="utf-8")), str(file))
    rows = []
    for task in names:
        trial = Trial(opened, tokenizer, task, tasks, work)
        before = trial.judge("", None, "", tokens, held_out_tokens)
        found = trial.follow(key, decided, held_out_tokens)
        windows = [window for window in trial.held_out(held_out_tokens) if len(window.ids) > 1]
        foreseen = reward_of(opened, windows).numpy()
        with following(opened, found["policy"]):
            used = count_experts(opened, windows).mean(axis=1)
        # The last token of a window has no next one.
        ends = np.cumsum([len(window.ids) for window in windows]) - 1
        thirds = np.array_split(np.delete(used, ends)[np.argsort(-foreseen)], 3)
        rows.append(
            [
                task,
                show_score(before["score"]),
                f"{found['used']:.2f}",
                *(f"{third.mean():.2f}" for third in thirds),
                show_drop(before["score"], found["score"]),
            ]
        )
    heading = ["task", "perplexity at top-k [95%]", "experts per token"]
    heading += [f"{third} third of tokens" for third in ("best foreseen", "middle", "worst")]
    write_table([*heading, "rise [95%]"], rows)


def mix(tasks: Path, names: Sequence[str], path: Path) -> TaskFile:
    """Take lines of each task in turn until one has no more."""
    records = [(tasks / f"{name}.train.jsonl").read_text().splitlines() for name in names]
    turns = [line for turn in zip(*records, strict=False) for line in turn]
    path.write_text("\n".join(turns) + "\n")
    return TaskFile.load(path.name.partition(".")[0], path)


if __name__ == "__main__":
    main()
