"""What Ada-K's paper leaves open: gamma, the clip, and whether the likeliest number counts.

Heads are trained with each gamma, clip and learning rate, the rest as always (gamma 1, clip
0.2, 1e-4), four times as long, not at all after the warm-up, and after a warm-up by what
experts cost. They are judged on lines that nothing has read: perplexity with the likeliest
numbers, and with drawn ones, both at what the tokens really used.

Run it from the repository's root, with the demo's model and a folder that
benchmarks/reference_moe/corpus.py wrote::

    python -m benchmarks.adaptive_k.ablation demo/moe --tasks demo/domains --work policies

Markdown goes to stdout, progress to stderr; --work keeps what is finished, and may be that of
policies.py.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import click
import torch

from benchmarks.adaptive_k.trial import Trial
from benchmarks.tables import show_drop, show_score, write_table
from benchmarks.task_options import on_one_task
from edgemoe.allocate.heads import Heads
from edgemoe.allocate.rollout import draw, reward_of
from edgemoe.models import load_model, load_tokenizer
from edgemoe.models.k_policy import following

if TYPE_CHECKING:
    from pathlib import Path

_VARIANTS = (
    "steps=0",
    "",
    "gamma=0.98",
    "gamma=0.9",
    "clip=0.05",
    "clip=0.4",
    "learning_rate=0.001",
    "steps=256",
    "warm=fisher,steps=0",
    "warm=fisher",
)


@click.command()
@on_one_task
@click.option("--mean-k", default=3.9, show_default=True)
@click.option("--variant", "variants", multiple=True, default=_VARIANTS)
@click.option("--tokens", default=16384, show_default=True)
@click.option("--held-out-tokens", default=4096, show_default=True)
def main(
    model: Path,
    tasks: Path,
    task: str,
    work: Path,
    mean_k: float,
    variants: tuple[str, ...],
    tokens: int,
    held_out_tokens: int,
    threads: int,
) -> None:
    """Train heads for MODEL with other choices."""
    torch.set_num_threads(threads)
    work.mkdir(parents=True, exist_ok=True)
    opened, tokenizer = load_model(model), load_tokenizer(model)
    trial = Trial(opened, tokenizer, task, tasks, work)
    before = trial.judge("", None, "", tokens, held_out_tokens)
    # A window of one token has no next one to foresee.
    windows = [window for window in trial.held_out(held_out_tokens) if len(window.ids) > 1]
    rows = [["router's top-k", f"{before['used']:.2f}", show_score(before["score"]), "", ""]]
    for variant in variants:
        found = trial.judge("ada-k", mean_k, variant, tokens, held_out_tokens)
        rules = found["policy"].rules
        slots = [rule.slots for rule in rules]
        heads = Heads.zeros(slots, opened.shape.hidden_size)
        with torch.no_grad():
            for layer, rule in enumerate(rules):
                heads.weight[layer, : rule.slots] = torch.from_numpy(rule.allocator)
        rollout = draw(opened, windows, heads, torch.Generator().manual_seed(0))
        with following(opened, found["policy"]):
            likeliest = float(reward_of(opened, windows).mean())
        drawn = float(rollout.rewards.mean())
        mean = float(rollout.numbers.float().mean()) + 1
        rows.append(
            [
                f"`{variant}`" if variant else "as always",
                f"{found['used']:.2f}",
                show_score(found["score"]),
                show_drop(before["score"], found["score"]),
                f"{math.exp(likeliest - drawn) - 1:+.1%} at {mean:.2f}",
            ]
        )
    heading = ["training", "experts per token", "perplexity [95%]", "rise over top-k [95%]"]
    write_table([*heading, "drawn numbers against the likeliest"], rows)


if __name__ == "__main__":
    main()
