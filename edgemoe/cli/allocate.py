"""``edgemoe allocate``: how many experts each token uses."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import click

from edgemoe.cli.extras import needs
from edgemoe.cli.options import PATH, force_option, output_option, report, reporting

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


@click.command()
@click.argument("model", type=PATH)
@click.option("--task", required=True, metavar="NAME=FILE", help="What k is decided on.")
@click.option(
    "--policy",
    "name",
    default="fisher",
    show_default=True,
    metavar="P",
    help="fisher, fixed, alloc-l, top-p or ada-k.",
)
@click.option(
    "--plan",
    "plan_path",
    type=PATH,
    metavar="PLAN",
    help="What is done to MODEL first; the new plan does both, with this policy in place of "
    "one that the plan has. MODEL as it is without.",
)
@click.option(
    "--mean-k",
    type=float,
    metavar="K",
    help="Experts per token and layer to aim at; two thirds of the router's own without, but "
    "ada-k then goes where its regulariser leads.",
)
@click.option(
    "--set",
    "options",
    multiple=True,
    metavar="NAME=VALUE",
    help="An option of the policy, repeatable: k=4 or k=4,4,5,... for fixed; tokens=1024 and "
    "deeper=one or all for alloc-l; p=0.7, k_max=8 and tokens=4096 for top-p; ridge=0 and "
    "tokens=16384 for fisher; steps=64, batch_tokens=1024, k_max, regulariser=0.003 and more "
    "for ada-k.",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    default=16384,
    show_default=True,
    help="Of the task, from its first line on.",
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), metavar="N", help="CPU threads.")
@output_option("Plan")
@force_option
@reporting
def allocate(
    model: Path,
    task: str,
    name: str,
    plan_path: Path | None,
    mean_k: float | None,
    options: tuple[str, ...],
    max_tokens: int,
    seed: int,
    threads: int | None,
    output: Path,
    force: bool,
    as_json: bool,
) -> None:
    """Decide how many of MODEL's experts each token uses.

    The decision is added to a plan: `edgemoe apply` writes it into a checkpoint. No weight of
    the model changes, and a token's number depends on that token alone. When ada-k is
    interrupted, the same command goes on.
    """
    needs("export")
    from dataclasses import replace

    import torch

    from edgemoe.allocate.registry import allocate as allocate_k
    from edgemoe.allocate.registry import find_policy, read_options
    from edgemoe.allocate.usage import count_experts
    from edgemoe.apply.in_memory import apply_plan
    from edgemoe.calibrate.windows import cut_tasks
    from edgemoe.errors import OutputError
    from edgemoe.layerwise.provider import InMemoryLayers
    from edgemoe.models import load_model, load_tokenizer
    from edgemoe.models.k_policy import following
    from edgemoe.oracle.oracle import LayerOracle
    from edgemoe.plans.keep_all import keep_all
    from edgemoe.plans.plan import Plan
    from edgemoe.recover.state import PROGRESS
    from edgemoe.resume import partial_path, resumable
    from edgemoe.staging import refuse_existing, refuse_inputs_inside
    from edgemoe.tasks import load_tasks
    from edgemoe.versions import library_versions

    refuse_existing(output, force=force, directory=False)
    chosen = read_options(name, options)
    if not find_policy(name).trains and partial_path(output).exists():
        raise OutputError(
            f"{partial_path(output)} is of a training that was interrupted. Finish it with the "
            "same command, remove it, or choose another -o."
        )
    if threads is not None:
        torch.set_num_threads(threads)
    (lines,) = load_tasks([task])
    refuse_inputs_inside(output, model, lines.path, *filter(None, [plan_path]))
    plan = None if plan_path is None else replace(Plan.load(plan_path), k_policy=None)
    opened = load_model(model)
    sha256 = opened.sha256
    if plan is None:
        plan = replace(keep_all(opened.shape), checkpoint_sha256=sha256)
    else:
        opened = apply_plan(opened, plan)
    cut = cut_tasks(opened, [lines], load_tokenizer(model), max_tokens=max_tokens)
    windows = cut.by_task[lines.name]
    key = {
        "command": "allocate",
        "checkpoint": sha256,
        "plan": plan.sha256,
        "lines": lines.sha256,
        "policy": name,
        "options": [mean_k, max_tokens, seed, threads, sorted(chosen.items())],
        "versions": library_versions(),
    }
    with contextlib.ExitStack() as stack:
        work = None
        if find_policy(name).trains:
            work = stack.enter_context(resumable(output, key, PROGRESS, force=force))
        policy = allocate_k(
            LayerOracle(InMemoryLayers(opened), windows),
            name,
            task=lines.name,
            mean_k=mean_k,
            seed=seed,
            options=chosen,
            work=work,
        )
        before = count_experts(opened, windows)
        with following(opened, policy):
            after = count_experts(opened, windows)
        plan = replace(plan, k_policy=policy)
        plan.save(output, force=force)
    result: dict[str, Any] = {
        "output": output,
        "sha256": plan.sha256,
        "policy": name,
        "task": lines.name,
        "tokens": len(after),
        "mean_k": float(after.mean()),
        "mean_k_before": float(before.mean()),
        "mean_k_per_layer": [round(float(mean), 4) for mean in after.mean(axis=0)],
        "most_k_per_layer": [rule.slots for rule in policy.rules],
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
