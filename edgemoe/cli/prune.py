"""`edgemoe prune`: statistics of a task to a plan."""

from __future__ import annotations

from typing import Any

import click

from edgemoe.api.prune import prune as decide
from edgemoe.cli.options import (
    PATH,
    RAY,
    THREADS,
    command,
    force_option,
    options_of,
    output_option,
    report,
    reporting,
    span,
)

option = options_of(decide)


def parse_weights(
    _: click.Context, __: click.Parameter, texts: tuple[str, ...]
) -> dict[str, float]:
    """Turn `NAME` and `NAME=WEIGHT` into weights by name."""
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


def parse_experts(
    _: click.Context, __: click.Parameter, text: str | None
) -> int | tuple[int, ...] | None:
    """Read how many experts layers keep."""
    from edgemoe.errors import PlanError
    from edgemoe.prune.keep import parse_keep_experts

    try:
        return None if text is None else parse_keep_experts(text)
    except PlanError as error:
        raise click.BadParameter(str(error), param_hint="--keep-experts") from error


@command(
    "edgemoe prune demo/moe --stats code.stats --task code --method reap --keep 0.5"
    " -o code.plan.json",
)
@click.argument("model", type=PATH)
@option(
    "--stats",
    "statistics",
    type=PATH,
    metavar="STATS",
    help="Statistics of MODEL, as `edgemoe calibrate` writes them.",
)
@option(
    "--task",
    multiple=True,
    metavar="NAME[=WEIGHT]",
    callback=parse_weights,
    help="A task of the statistics; several, each with its weight (1 by default), are mixed.",
)
@option(
    "--method",
    metavar="M",
    help="frequency, man, moe-i2, msan, naee, random, reap, ream, seer or uncurl; camera and "
    "heapr prune the width: they keep all experts and choose their intermediate channels.",
)
@option(
    "--keep",
    type=float,
    metavar="F",
    help="Fraction of each layer's experts to keep, or of all intermediate channels with "
    "camera and heapr, (0, 1].",
)
@option(
    "--keep-experts",
    metavar="N",
    callback=parse_experts,
    help="Experts to keep in each layer: one number, a number per layer with commas between "
    "them, or the file of a JSON list.",
)
@option(
    "--layers",
    type=click.Choice(["uniform", "owl"]),
    help="owl (Outlier Weighed Layerwise sparsity): as many experts in all, more of them in "
    "layers whose weights have more outliers on the task. Its options: --set owl-multiple=5 "
    "--set owl-range=0.08.",
)
@option("--seed", type=int, help="Seed of methods that draw at random.")
@option(
    "--set",
    "options",
    multiple=True,
    metavar="NAME=VALUE",
    help="An option of the method, such as population=50 for moe-i2; repeatable. A wrong name "
    "lists them.",
)
@option(
    "--workers",
    type=click.IntRange(1),
    metavar="N",
    help="moe-i2 and naee: search N layers at once, on processes of this machine or on the Ray "
    "cluster; each process loads the model.",
)
@option("--ray", metavar="ADDRESS", help=f"moe-i2 and naee: {RAY['help']}")
@option("--threads", **THREADS)
@output_option("Plan")
@force_option
@reporting
def prune(as_json: bool, **given: Any) -> None:
    """Decide which experts, or which of their intermediate channels, a task keeps.

    The plan is a decision: no weight is moved before `edgemoe apply`. Most methods read the
    statistics only; camera, heapr, moe-i2, naee and ream also run MODEL's layers on the tokens
    that are kept there, as --layers owl does.
    """
    plan = decide(**given)
    from edgemoe.calibrate.statistics import Statistics
    from edgemoe.prune.registry import find_method

    # The checkpoint's own: statistics of another one were refused.
    shape, kept = Statistics.read_shape(given["statistics"]), plan.experts_per_layer
    result: dict[str, Any] = {
        "output": given["output"],
        "sha256": plan.sha256,
        "method": plan.method,
        "task": plan.task,
        "experts_per_layer": list(kept),
        "experts_before": list(shape.experts_per_layer),
    }
    text = (
        f"{given['output']}: {plan.method} for {plan.task} keeps {sum(kept)} of "
        f"{sum(shape.experts_per_layer)} experts in {len(kept)} layers"
    )
    if find_method(plan.method).prunes_width:
        before, widths = shape.widths_per_layer, plan.widths(shape)
        result |= {"widths_per_layer": list(widths), "widths_before": list(before)}
        text += f", stored {span(widths)} of {span(before)} neurons wide"
    report(result, text, as_json=as_json)
