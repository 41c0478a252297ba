"""What each part of MoE-I² adds: importance, genetic search, reception field, ranks, LoRA.

One task, half of the experts. Importance is measured once, and then the parts are added one by
one: scores of single experts within equal layers; layers that keep as many as their importance
says; the genetic search in place of single scores; the blocks after it; then low ranks for the
experts that are left; then training. Beside them REAP, and least squares in place of LoRA. Run
it from the repository's root, with the demo's model and a folder that
benchmarks/reference_moe/corpus.py wrote::

    python -m benchmarks.compression.moe_i2_parts demo/moe --tasks demo/domains --work parts

Markdown goes to stdout, progress to stderr; --work keeps what is finished. About an hour of one
x86-64 core for the reference model, a third of it LoRA.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click
import numpy as np

from benchmarks.commands import Commands
from benchmarks.tables import megabytes, show_drop, show_score, write_table
from benchmarks.task_options import on_one_task
from edgemoe.calibrate.mixture import mix
from edgemoe.calibrate.statistics import Statistics
from edgemoe.layerwise.provider import open_layers
from edgemoe.oracle.ablation import loss_increases
from edgemoe.oracle.oracle import LayerOracle
from edgemoe.plans.plan import Plan
from edgemoe.prune.keep import count_kept
from edgemoe.prune.moe_i2 import share_out
from edgemoe.prune.selection import keep_highest

if TYPE_CHECKING:
    from pathlib import Path


@click.command()
@on_one_task
@click.option("--keep", default=0.5, show_default=True)
@click.option("--param-ratio", default=0.75, show_default=True, help="Of the ranks.")
@click.option("--calibration-tokens", default=8192, show_default=True)
@click.option("--importance-tokens", default=512, show_default=True)
@click.option("--held-out-tokens", default=3072, show_default=True)
@click.option("--steps", default=24, show_default=True, help="Of LoRA, 1024 tokens each.")
def main(
    model: Path,
    tasks: Path,
    task: str,
    work: Path,
    keep: float,
    param_ratio: float,
    calibration_tokens: int,
    importance_tokens: int,
    held_out_tokens: int,
    steps: int,
    threads: int,
) -> None:
    """Add the parts of MoE-I² to MODEL one by one."""
    commands = Commands(work, threads)
    train = tasks / f"{task}.train.jsonl"
    lines = f"{task}={train}"
    stats = commands.calibrate(model, task, train, calibration_tokens)
    importance = _measure(model, stats, task, work / "measured.json", importance_tokens)
    shares = _plan_by_importance(stats, task, importance, keep, work)

    prune = ("prune", model, "--stats", stats, "--task", task)
    search = (*prune, "--method", "moe-i2", "--set", "ratios=given")
    counts = ("--keep-experts", ",".join(map(str, shares)))
    commands.make("reap.json", *prune, "--method", "reap", "--keep", keep)
    commands.make("search-equal.json", *search, "--set", "candidates=1", "--keep", keep)
    commands.make("blocks-equal.json", *search, "--keep", keep)
    commands.make("search.json", *search, "--set", "candidates=1", *counts)
    commands.make("blocks.json", *search, *counts)
    of_task = ("--stats", stats, "--task", task, "--plan", work / "blocks.json")
    rank = ("decompose", model, *of_task, "--param-ratio", param_ratio)
    commands.make("ranks.json", *rank, "--method", "svd", "--set", "importance=loss")
    commands.make("ranks-whitened.json", *rank, "--method", "svd-whitened")

    plans = {
        "reap": "REAP, equal layers",
        "importance-equal": "importance of single experts, equal layers",
        "importance": "importance of experts and layers",
        "search-equal": "genetic search, equal layers",
        "blocks-equal": "genetic search and blocks, equal layers",
        "search": "importance of layers, genetic search",
        "blocks": "importance of layers, genetic search, blocks (moe-i2)",
        "ranks": f"moe-i2, then SVD at {param_ratio:g}",
        "ranks-whitened": f"moe-i2, then whitened SVD at {param_ratio:g}",
    }
    judged: dict[str, Path] = {}
    for name, shown in plans.items():
        commands.make(f"{name}-model", "apply", model, "--plan", work / f"{name}.json")
        judged[shown] = work / f"{name}-model"
    for name in ("reap", "blocks", "ranks"):
        recover = ("recover", work / f"{name}-model", "--teacher", model, "--task", lines)
        commands.make(f"{name}-squares", *recover, "--method", "least-squares")
        judged[f"{plans[name]}, then least squares"] = work / f"{name}-squares"
    recover = ("recover", work / "ranks-model", "--teacher", model, "--task", lines)
    trained = ("--method", "lora", "--steps", steps, "--batch-tokens", 1024)
    commands.make("ranks-lora", *recover, *trained)
    judged[f"{plans['ranks']}, then LoRA, {steps} steps"] = work / "ranks-lora"

    held_out = tasks / f"{task}.test.jsonl"
    before = commands.judge("unpruned", model, held_out, held_out_tokens)
    rows = [["unpruned", megabytes(model), show_score(before), ""]]
    for shown, checkpoint in judged.items():
        score = commands.judge(checkpoint.name, checkpoint, held_out, held_out_tokens)
        drop = show_drop(before, score)
        rows.append([shown, megabytes(checkpoint), show_score(score), drop])
    click.echo(f"Layers keep {', '.join(map(str, shares))} experts by importance.\n")
    write_table(["parts", "MB", "perplexity [95%]", "rise [95%]"], rows)


def _measure(model: Path, stats: Path, task: str, file: Path, tokens: int) -> list[list[float]]:
    """Measure the importance of every expert, which takes most of the time."""
    if not file.exists():
        windows = mix(Statistics.load(stats), {task: 1.0}).windows
        oracle = LayerOracle(open_layers(model), windows).fewer(tokens)
        found = [layer.tolist() for layer in loss_increases(oracle)]
        file.write_text(json.dumps(found), encoding="utf-8")
    measured: list[list[float]] = json.loads(file.read_text(encoding="utf-8"))
    return measured


def _plan_by_importance(
    stats: Path, task: str, importance: list[list[float]], keep: float, work: Path
) -> tuple[int, ...]:
    """Keep the most important experts, in equal layers and in others; return the others."""
    shape = Statistics.load(stats).shape
    equal = count_kept(shape, keep=keep)
    shares = share_out(shape.layers, [sum(layer) for layer in importance], sum(equal))
    checkpoint = Statistics.load(stats).checkpoint_sha256
    for name, counts in {"importance-equal": equal, "importance": shares}.items():
        layers = tuple(
            keep_highest(layer, np.array(scores), count)
            for layer, scores, count in zip(shape.layers, importance, counts, strict=True)
        )
        plan = Plan(method="importance", layers=layers, task=task, checkpoint_sha256=checkpoint)
        plan.save(work / f"{name}.json", force=True)
    return shares


if __name__ == "__main__":
    main()
