r"""Which tokens and which layers use more experts, by a policy's own decisions.

Held-out lines run under a policy; experts per token are averaged by layer, and by what the
token is: a word's beginning or its middle, a number, punctuation, white space. Run it from the
repository's root, with the demo's model and a folder that benchmarks/reference_moe/corpus.py
wrote::

    python -m benchmarks.adaptive_k.who_gets_more demo/moe --tasks demo/domains \
        --work policies --data who-gets-more.csv

Markdown goes to stdout, progress to stderr; --work keeps what is finished, and may be that of
policies.py. --data is what docs/pictures/who_gets_more.py draws.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
import torch

from benchmarks.adaptive_k.trial import Trial
from benchmarks.tables import write_csv, write_table
from benchmarks.task_options import on_several_tasks
from edgemoe.allocate.usage import count_experts
from edgemoe.models import load_model, load_tokenizer
from edgemoe.models.k_policy import following

_KINDS = ("begins a word", "goes on in a word", "number", "punctuation", "white space")
_FEWEST = 20  # tokens of a kind that are worth a mean


def kind_of(text: str) -> str:
    """Say what a token is.

    Args:
        text: The token alone, decoded.

    Returns:
        One of the kinds.
    """
    if not text.strip():
        return "white space"
    core = text.strip()
    if core.isdigit():
        return "number"
    if not any(character.isalnum() for character in core):
        return "punctuation"
    return "begins a word" if text[:1].isspace() else "goes on in a word"


@click.command()
@on_several_tasks
@click.option("--data", type=click.Path(path_type=Path), help="CSV of all layers.")
@click.option("--policy", "policies", multiple=True, default=("fisher", "ada-k"))
@click.option("--mean-k", default=3.9, show_default=True)
@click.option("--tokens", default=16384, show_default=True)
@click.option("--held-out-tokens", default=4096, show_default=True)
def main(
    model: Path,
    tasks: Path,
    names: tuple[str, ...],
    work: Path,
    data: Path | None,
    policies: tuple[str, ...],
    mean_k: float,
    tokens: int,
    held_out_tokens: int,
    threads: int,
) -> None:
    """Look at what MODEL's tokens use."""
    torch.set_num_threads(threads)
    work.mkdir(parents=True, exist_ok=True)
    opened, tokenizer = load_model(model), load_tokenizer(model)
    rows: list[list[str]] = []
    layers: list[list[object]] = []
    for asked in policies:
        name, _, options = asked.partition(":")
        for task in names:
            trial = Trial(opened, tokenizer, task, tasks, work)
            policy = trial.judge(name, mean_k, options, tokens, held_out_tokens)["policy"]
            windows = trial.held_out(held_out_tokens)
            with following(opened, policy):
                used = count_experts(opened, windows)
            ids = [token for window in windows for token in window.ids]
            kinds = np.array([kind_of(tokenizer.decode([token])) for token in ids])
            by_token = used.mean(axis=1)
            means = [
                f"{by_token[kinds == kind].mean():.2f}"
                if (kinds == kind).sum() >= _FEWEST
                else ""
                for kind in _KINDS
            ]
            rows.append([f"`{asked}`", task, f"{used.mean():.2f}", *means])
            by_layer = zip(opened.layers, used.mean(axis=0), strict=True)
            layers += [[asked, task, layer.index, f"{mean:.4f}"] for layer, mean in by_layer]
    if data is not None:
        write_csv(data, ["policy", "task", "layer", "experts_per_token"], layers)
    write_table(["policy", "task", "all tokens", *_KINDS], rows)


if __name__ == "__main__":
    main()
