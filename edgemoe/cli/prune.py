"""``edgemoe prune``: statistics of a task to a plan."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from edgemoe.cli.extras import needs
from edgemoe.cli.options import PATH, force_option, output_option, report, reporting, span

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
    help="frequency, man, moe-i2, msan, naee, random, reap, ream, seer or uncurl; camera and "
    "heapr keep all experts and choose their neurons.",
)
@click.option(
    "--keep",
    type=float,
    metavar="F",
    help="Fraction of each layer's experts to keep, or of all neurons with camera and heapr, "
    "(0, 1].",
)
@click.option(
    "--keep-experts",
    metavar="N",
    help="Experts to keep in each layer: one number, a number per layer with commas between "
    "them, or the file of a JSON list.",
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
    seed: int,
    options: tuple[str, ...],
    output: Path,
    force: bool,
    as_json: bool,
) -> None:
    """Decide which experts, or which of their neurons, a task keeps. No weight is moved.

    Most methods read the statistics only; camera, heapr, moe-i2, naee and ream also run MODEL's
    layers on the tokens that are kept there.
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
    from edgemoe.prune.registry import count_for, find_method, make_plan, read_options
    from edgemoe.staging import refuse_existing

    refuse_existing(output, force=force, directory=False)
    try:
        asked = None if keep_experts is None else parse_keep_experts(keep_experts)
    except PlanError as error:
        raise click.BadParameter(str(error), param_hint="--keep-experts") from error
    chosen = read_options(method, options)
    weights = parse_weights(tasks)
    picks_neurons = find_method(method).picks_neurons
    if picks_neurons and asked is not None:
        raise PlanError(
            f"{method} must be told a fraction of the neurons, since it keeps all experts, got "
            f"--keep-experts {keep_experts}. Use --keep."
        )
    shape = read_shape(model)
    if keep is not None:
        counts = count_for(method, shape, keep)
    else:
        counts = count_kept(shape, keep_experts=asked)
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
    result: dict[str, Any] = {
        "output": output,
        "sha256": plan.sha256,
        "method": method,
        "task": plan.task,
        "experts_per_layer": list(kept),
        "experts_before": list(shape.experts_per_layer),
    }
    text = (
        f"{output}: {method} for {plan.task} keeps {sum(kept)} of "
        f"{sum(shape.experts_per_layer)} experts in {len(kept)} layers"
    )
    if picks_neurons:
        before, widths = shape.widths_per_layer, plan.widths(shape)
        result |= {"widths_per_layer": list(widths), "widths_before": list(before)}
        text += f", stored {span(widths)} of {span(before)} neurons wide"
    report(result, text, as_json=as_json)
