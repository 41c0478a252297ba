r"""Which tokens and which layers use more experts, by a policy's own decisions.

Held-out lines run under a policy; experts per token are averaged by layer, and by what the
token is: a word's beginning or its middle, a number, punctuation, white space. Run it from the
repository's root, with the demo's model and a folder that benchmarks/reference_moe/corpus.py
wrote::

    python -m benchmarks.adaptive_k.who_gets_more demo/moe --tasks demo/domains \
        --work policies --plot docs/images/who-gets-more.png

Markdown goes to stdout, progress to stderr; --work keeps what is finished, and may be that of
policies.py.
"""

from __future__ import annotations

from pathlib import Path

import click
import matplotlib as mpl
import numpy as np
import torch

from benchmarks.adaptive_k.trial import Trial
from benchmarks.tables import write_table
from benchmarks.task_options import on_several_tasks
from edgemoe.allocate.usage import count_experts
from edgemoe.models import load_model, load_tokenizer
from edgemoe.models.k_policy import following

mpl.use("agg")
import matplotlib.pyplot as plt

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
@click.option("--plot", type=click.Path(path_type=Path), required=True)
@click.option("--policy", "policies", multiple=True, default=("fisher", "ada-k"))
@click.option("--mean-k", default=3.9, show_default=True)
@click.option("--tokens", default=16384, show_default=True)
@click.option("--held-out-tokens", default=4096, show_default=True)
def main(
    model: Path,
    tasks: Path,
    names: tuple[str, ...],
    work: Path,
    plot: Path,
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
    figure, axes = plt.subplots(
        1, len(policies), figsize=(5 * len(policies), 3.5), sharey=True, squeeze=False
    )
    rows = []
    for axis, asked in zip(axes[0], policies, strict=True):
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
            axis.plot(used.mean(axis=0), label=task)
        axis.set_title(f"{asked}, {mean_k:g} experts per token asked")
        axis.set_xlabel("MoE layer")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("experts per token")
    axes[0][-1].legend()
    figure.tight_layout()
    plot.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(plot, dpi=120)
    write_table(["policy", "task", "all tokens", *_KINDS], rows)


if __name__ == "__main__":
    main()
