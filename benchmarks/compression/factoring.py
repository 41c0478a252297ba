"""Ranks: whitened against plain SVD, and factored experts against shared bases.

All at the same fraction of the routed experts' parameters: perplexity on a task, and the speed
of fp32 graphs, which `edgemoe bench` measures in turn, several times. The task's
perplexity is that of MODEL; speeds are measured on MODEL and on a random model whose experts
dominate (hidden size 1024, 4 layers of 16 experts of 1024 neurons, top-4), where thin matrices
have something to win. Run it from the repository's root, with the demo's model and a folder
that benchmarks/reference_moe/corpus.py wrote::

    python -m benchmarks.compression.factoring demo/moe --tasks demo/domains --work factoring

Markdown goes to stdout, progress to stderr; --work keeps what is finished.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

import click

from benchmarks.commands import Commands
from benchmarks.tables import megabytes, show_drop, show_score, write_table
from benchmarks.task_options import on_one_task
from benchmarks.wide_model import write_wide_model

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_METHODS = ("svd", "svd-whitened", "shared-basis")
# One of the two that are stored in the same way.
_FACTORED, _BASED = "svd-whitened", "shared-basis"


@click.command()
@on_one_task
@click.option("--ratio", "ratios", type=float, multiple=True, default=(0.75, 0.5))
@click.option("--calibration-tokens", default=8192, show_default=True)
@click.option("--held-out-tokens", default=3072, show_default=True)
@click.option("--rounds", default=9, show_default=True)
def main(
    model: Path,
    tasks: Path,
    task: str,
    work: Path,
    ratios: tuple[float, ...],
    calibration_tokens: int,
    held_out_tokens: int,
    rounds: int,
    threads: int,
) -> None:
    """Factor the experts of MODEL in three ways."""
    commands = Commands(work, threads)
    commands.calibrate(model, task, tasks / f"{task}.train.jsonl", calibration_tokens)
    held_out = tasks / f"{task}.test.jsonl"
    before = commands.judge("unpruned", model, held_out, held_out_tokens)
    rows = [["whole", "", megabytes(model), show_score(before), ""]]
    for ratio in ratios:
        for method in _METHODS:
            small = _factor(commands, model, "stats.safetensors", task, method, ratio)
            score = commands.judge(small.name, small, held_out, held_out_tokens)
            drop = show_drop(before, score)
            rows.append([method, f"{ratio:g}", megabytes(small), show_score(score), drop])
    write_table(["experts", "ratio", "MB", "perplexity [95%]", "rise [95%]"], rows)

    wide, text = write_wide_model(work, num_hidden_layers=4, moe_intermediate_size=1024)
    commands.make("wide.safetensors", "calibrate", wide, "--task", f"wide={text}")
    speeds = []
    for shown, whole, stats, of in (
        (model.name, model, "stats.safetensors", task),
        ("wide", wide, "wide.safetensors", "wide"),
    ):
        for ratio in ratios:
            models = {"whole": whole}
            for method in (_FACTORED, _BASED):
                models[method] = _factor(commands, whole, stats, of, method, ratio)
            bundles = {name: _export(commands, path) for name, path in models.items()}
            found = _time(commands, bundles, rounds, threads)
            for name, (prefill, decode) in found.items():
                against = found["whole"]
                speeds.append(
                    [
                        shown,
                        f"{ratio:g}",
                        name,
                        f"{prefill:.0f}",
                        f"{prefill / against[0]:.2f}",
                        f"{decode:.1f}",
                        f"{decode / against[1]:.2f}",
                    ]
                )
    click.echo()
    heading = ["model", "ratio", "experts", "prefill, tokens/s", "of whole"]
    write_table([*heading, "decode, tokens/s", "of whole"], speeds)


def _factor(
    commands: Commands, model: Path, stats: str, task: str, method: str, ratio: float
) -> Path:
    name = f"{model.name}-{method}-{ratio:g}"
    of_task = ("--stats", commands.work / stats, "--task", task)
    asked = (*of_task, "--method", method, "--param-ratio", ratio)
    commands.make(f"{name}.json", "decompose", model, *asked)
    commands.make(name, "apply", model, "--plan", commands.work / f"{name}.json")
    return commands.work / name


def _export(commands: Commands, model: Path) -> Path:
    name = f"{model.name}-bundle"
    commands.make(name, "export", model, "--target", "cpu", "--precision", "fp32")
    return commands.work / name


def _time(
    commands: Commands, bundles: Mapping[str, Path], rounds: int, threads: int
) -> dict[str, tuple[float, float]]:
    """Return medians of prefill and decode in tokens per second, all bundles in turn."""
    speeds: dict[str, list[tuple[float, float]]] = {name: [] for name in bundles}
    asked = ("--prompt-tokens", 128, "--new-tokens", 32, "--repeat", 1, "--threads", threads)
    for number in range(rounds):
        for name, bundle in bundles.items():
            answer = commands.run(
                f"bench-{bundle.name}-{number}", "bench", bundle, *asked
            ).answer
            speeds[name].append((answer["prefill_tokens_per_s"], answer["decode_tokens_per_s"]))
    return {
        name: (
            statistics.median(prefill for prefill, _ in found),
            statistics.median(decode for _, decode in found),
        )
        for name, found in speeds.items()
    }


if __name__ == "__main__":
    main()
