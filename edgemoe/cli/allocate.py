"""`edgemoe allocate`: how many experts each token uses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from edgemoe.api.allocate import allocate as decide
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
    from collections.abc import Mapping

option = options_of(decide)


@command(
    "edgemoe allocate demo/moe --task code=demo/tasks/code.train.jsonl --mean-k 4"
    " -o code.k.json",
)
@click.argument("model", type=PATH)
@option("--task", metavar="NAME=FILE", help="Data that k is decided on, JSON Lines.")
@option("--policy", metavar="P", help="fisher, fixed, alloc-l, top-p or ada-k.")
@option(
    "--plan",
    type=PATH,
    metavar="PLAN",
    help="What is done to MODEL first; the new plan does both, with this policy in place of "
    "one that the plan has. MODEL as it is without.",
)
@option(
    "--mean-k",
    type=float,
    metavar="K",
    help="Experts per token and layer to aim at; two thirds of the router's top_k without, but "
    "ada-k then goes where its regulariser leads.",
)
@option(
    "--set",
    "options",
    multiple=True,
    metavar="NAME=VALUE",
    help="An option of the policy, repeatable: k=4 or k=4,4,5,... for fixed; tokens=1024 and "
    "deeper=one or all for alloc-l; p=0.7, k_max=8 and tokens=4096 for top-p; ridge=0 and "
    "tokens=16384 for fisher; steps=64, batch_tokens=1024, k_max, regulariser=0.003 and more "
    "for ada-k.",
)
@option(
    "--max-tokens",
    type=click.IntRange(min=1),
    help="Tokens of the task to read, from its first example on.",
)
@option("--seed", type=int, help="Seed of policies that draw at random.")
@option("--threads", **THREADS)
@output_option("Plan")
@force_option
@reporting
def allocate(as_json: bool, task: str, **given: Any) -> None:
    """Decide how many of MODEL's experts each token uses (adaptive top-k).

    The k policy is added to a plan: `edgemoe apply` writes it into a checkpoint. No weight of
    the model changes, and a token's k depends on that token alone. When the training of ada-k
    is interrupted, the same command goes on.
    """
    allocated = decide(task=split_task_arguments([task]), **given)
    result: dict[str, Any] = {
        "output": given["output"],
        "sha256": allocated.plan.sha256,
        "policy": given["policy"],
        "task": allocated.task,
        "tokens": allocated.tokens,
        "mean_k": allocated.mean_k,
        "mean_k_before": allocated.mean_k_before,
        "mean_k_per_layer": [round(mean, 4) for mean in allocated.mean_k_per_layer],
        "most_k_per_layer": list(allocated.most_k_per_layer),
    }
    report(result, _text(result), as_json=as_json)


def _text(result: Mapping[str, Any]) -> str:
    means = ", ".join(f"{mean:.3g}" for mean in result["mean_k_per_layer"])
    saves = result["mean_k"] < result["mean_k_before"]
    note = "" if saves else "\nnote: no token uses fewer experts than before; lower --mean-k"
    return (
        f"{result['output']}: {result['policy']} for {result['task']}\n"
        f"experts per token and layer: {result['mean_k']:.3f}, at most "
        f"{max(result['most_k_per_layer'])}; {result['mean_k_before']:.3f} before, over "
        f"{result['tokens']} tokens\n"
        f"per layer: {means}{note}"
    )
