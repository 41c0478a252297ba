r"""Quality against experts per token, for every policy, on tasks of the reference model.

Each policy decides on a task's calibration lines how many experts tokens use, for several
means, and is judged on lines that nothing has read: perplexity against what the tokens really
used, and its rise over the router's own top-k with a 95% interval over paired lines. Run it
from the repository's root, with the demo's model and a folder that
benchmarks/reference_moe/corpus.py wrote::

    python -m benchmarks.adaptive_k.policies demo/moe --tasks demo/domains --work policies \
        --data policies.csv

Markdown goes to stdout, progress to stderr; --work keeps what is finished, and --data is what
docs/pictures/policies.py draws. The training of ada-k takes most of the time. What a policy
measures once for all means is in the seconds of the first.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
import torch

from benchmarks.adaptive_k.trial import Trial
from benchmarks.tables import show_drop, show_score, write_csv, write_table
from benchmarks.task_options import on_several_tasks
from edgemoe.evaluate.drop import paired_drop
from edgemoe.models import load_model, load_tokenizer

if TYPE_CHECKING:
    from edgemoe.k_policy import KPolicy


@click.command()
@on_several_tasks
@click.option("--mean-k", "means", type=float, multiple=True, default=(5.0, 3.9, 3.0))
@click.option(
    "--policy",
    "policies",
    multiple=True,
    default=(
        "fixed",
        "alloc-l",
        "top-p",
        "top-p:k_max=12",
        "ada-k:steps=0",
        "ada-k",
        "ada-k:warm=fisher",
        "fisher",
        "fisher:k_max=12",
    ),
    help="NAME or NAME:OPTION=VALUE,...; repeatable.",
)
@click.option("--tokens", default=16384, show_default=True)
@click.option("--held-out-tokens", default=4096, show_default=True)
@click.option("--data", type=click.Path(path_type=Path), help="CSV of all curves.")
def main(
    model: Path,
    tasks: Path,
    names: tuple[str, ...],
    work: Path,
    means: tuple[float, ...],
    policies: tuple[str, ...],
    tokens: int,
    held_out_tokens: int,
    data: Path | None,
    threads: int,
) -> None:
    """Compare policies on MODEL."""
    torch.set_num_threads(threads)
    work.mkdir(parents=True, exist_ok=True)
    opened, tokenizer = load_model(model), load_tokenizer(model)
    curves: list[list[object]] = []
    for task in names:
        trial = Trial(opened, tokenizer, task, tasks, work)
        before = trial.judge("", None, "", tokens, held_out_tokens)
        rows = [["top-k", f"{before['used']:.2f}", show_score(before["score"]), "", "", ""]]
        for asked in policies:
            name, _, options = asked.partition(":")
            for mean in means:
                found = trial.judge(name, mean, options, tokens, held_out_tokens)
                rise = paired_drop(before["score"], found["score"])
                figures = (found["used"], rise.value, *rise.ci95)
                curves.append([task, asked, f"{mean:g}", *(f"{x:.4f}" for x in figures)])
                rows.append(
                    [
                        f"`{asked}`",
                        f"{found['used']:.2f}",
                        show_score(found["score"]),
                        show_drop(before["score"], found["score"]),
                        f"{found['seconds']:.0f}",
                        _parameters(found["policy"]),
                    ]
                )
        click.echo(f"\n**{task}**\n")
        heading = ["policy", "experts per token", "perplexity [95%]", "rise [95%]"]
        write_table([*heading, "processor seconds", "parameters of heads"], rows)
    if data is not None:
        columns = ("used", "rise", "rise_ci95_low", "rise_ci95_high")
        write_csv(data, ["task", "policy", "asked", *columns], curves)


def _parameters(policy: KPolicy) -> str:
    """Count the parameters of a policy's heads; nothing where it has none."""
    heads = [rule.allocator for rule in policy.rules if rule.allocator is not None]
    return f"{sum(head.size for head in heads):,}" if heads else ""


if __name__ == "__main__":
    main()
