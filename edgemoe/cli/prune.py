"""``edgemoe prune``: statistics of a task to a plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from edgemoe.cli.extras import needs
from edgemoe.cli.options import PATH, force_option, output_option, report, reporting

if TYPE_CHECKING:
    from pathlib import Path


def parse_weights(texts: tuple[str, ...]) -> dict[str, float]:
    """Turn ``NAME`` and ``NAME=WEIGHT`` into weights by name."""
    weights: dict[str, float] = {}
    for text in texts:
        name, equals, number = text.partition("=")
        try:
            weight = float(number) if equals else 1.0
        except ValueError as error:
            raise click.BadParameter(
                f"a weight must be a number, got {text!r}.", param_hint="--task"
            ) from error
        if name in weights:
            raise click.BadParameter(
                f"a task must come once, got {name!r}.", param_hint="--task"
            )
        weights[name] = weight
    return weights


@click.command()
@click.argument("model", type=PATH)
@click.option("--stats", type=PATH, required=True, metavar="STATS")
@click.option(
    "--task",
    "tasks",
    required=True,
    multiple=True,
    metavar="NAME[=WEIGHT]",
    help="A task of the statistics; several, each with its weight (1 by default), are mixed.",
)
@click.option(
    "--method",
    required=True,
    metavar="M",
    help="frequency, man, moe-i2, msan, naee, random, reap, ream, seer or uncurl.",
)
@click.option(
    "--keep", type=float, metavar="F", help="Fraction of each layer's experts to keep, (0, 1]."
)
@click.option(
    "--keep-experts",
    metavar="N",
    help="Experts to keep in each layer: one number, a number per layer with commas between "
    "them, or the file of a JSON list.",
)
@click.option(
    "--layers",
    type=click.Choice(["uniform", "owl"]),
    default="uniform",
    show_default=True,
    help="owl: as many experts in all, more of them in layers whose weights have more outliers "
    "on the task. Its options: --set owl-multiple=5 --set owl-range=0.08.",
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--set",
    "options",
    multiple=True,
    metavar="NAME=VALUE",
    help="An option of the method, such as population=50 for moe-i2; repeatable. A wrong name "
    "lists them.",
)
@output_option("Plan")
@force_option
@reporting
def prune(
    model: Path,
    stats: Path,
    tasks: tuple[str, ...],
    method: str,
    keep: float | None,
    keep_experts: str | None,
    layers: str,
    seed: int,
    options: tuple[str, ...],
    output: Path,
    force: bool,
    as_json: bool,
) -> None:
    """Decide which experts of MODEL a task keeps. No weight is moved.

    Most methods read the statistics only; moe-i2, naee and ream also run MODEL's layers on the
    tokens that are kept there, as --layers owl does.
    """
    if (keep is None) == (keep_experts is None):
        raise click.UsageError("give exactly one of --keep and --keep-experts.")
    needs("export")
    from edgemoe.calibrate.statistics import Statistics
    from edgemoe.errors import PlanError, StatisticsError
    from edgemoe.models import read_shape
    from edgemoe.models.fingerprint import fingerprint_checkpoint
    from edgemoe.oracle.homes import open_home
    from edgemoe.oracle.oracle import LayerOracle
    from edgemoe.prune.keep import count_kept, parse_keep_experts
    from edgemoe.prune.registry import make_plan, read_options
    from edgemoe.staging import refuse_existing

    refuse_existing(output, force=force, directory=False)
    try:
        asked = None if keep_experts is None else parse_keep_experts(keep_experts)
    except PlanError as error:
        raise click.BadParameter(str(error), param_hint="--keep-experts") from error
    chosen = read_options(method, [*_layers(layers, asked), *options])
    weights = parse_weights(tasks)
    shape = read_shape(model)
    counts = count_kept(shape, keep=keep, keep_experts=asked)
    statistics = Statistics.load(stats)
    if statistics.checkpoint_sha256 != fingerprint_checkpoint(model):
        raise StatisticsError(
            f"statistics must be of the checkpoint that is pruned, got {stats} of checkpoint "
            f"{statistics.checkpoint_sha256[:12]} for {model}. Calibrate {model}."
        )
    plan = make_plan(
        statistics,
        weights,
        method,
        counts,
        seed=seed,
        options=chosen,
        open_oracle=lambda windows: LayerOracle(open_home(model), windows),
    )
    plan.save(output, force=force)
    kept = plan.experts_per_layer
    report(
        {
            "output": output,
            "sha256": plan.sha256,
            "method": method,
            "task": plan.task,
            "experts_per_layer": list(kept),
            "experts_before": list(shape.experts_per_layer),
        },
        f"{output}: {method} for {plan.task} keeps {sum(kept)} of "
        f"{sum(shape.experts_per_layer)} experts in {len(kept)} layers",
        as_json=as_json,
    )


def _layers(layers: str, asked: int | tuple[int, ...] | None) -> list[str]:
    """Turn ``--layers`` into an option of the method."""
    if layers == "uniform":
        return []
    if isinstance(asked, tuple):
        raise click.UsageError(
            f"--layers {layers} decides how many experts each layer keeps: give --keep, or one "
            "number to --keep-experts."
        )
    return [f"layers={layers}"]
