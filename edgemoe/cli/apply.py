"""`edgemoe apply`: a plan, carried out on its checkpoint."""

from __future__ import annotations

from typing import Any

import click

from edgemoe.api.apply_plan import apply_plan
from edgemoe.cli.options import (
    PATH,
    command,
    force_option,
    options_of,
    output_option,
    report,
    reporting,
    span,
)

option = options_of(apply_plan)


@command("edgemoe apply demo/moe --plan code.plan.json -o moe-code")
@click.argument("model", type=PATH)
@option(
    "--plan",
    type=PATH,
    metavar="PLAN",
    help="Plan of `edgemoe prune`, `edgemoe decompose` or `edgemoe allocate`.",
)
@output_option("Checkpoint directory")
@option(
    "--max-shard-gb",
    type=click.FloatRange(min=0, min_open=True),
    metavar="GB",
    help="Size of the weight files, in 10^9 bytes.",
)
@force_option
@reporting
def apply(as_json: bool, **given: Any) -> None:
    """Prune, narrow, merge and factor the experts of MODEL as a plan says.

    Writes a checkpoint, which `edgemoe evaluate`, `edgemoe recover` and `edgemoe export` take.
    One decoder layer is in memory at a time. When it is interrupted, the same command goes on
    after the last finished layer or weight file.
    """
    applied = apply_plan(**given)
    plan, counts = applied.plan, applied.plan.experts_per_layer
    result: dict[str, Any] = {
        "output": applied.output,
        "experts_per_layer": list(counts),
        "family": applied.family,
    }
    text = (
        f"{applied.output}: {applied.family}, experts per layer {', '.join(map(str, counts))}"
    )
    if plan.prunes_width:
        result["widths_per_layer"] = list(applied.widths_per_layer)
        text += f", stored {span(applied.widths_per_layer)} neurons wide"
    if plan.factors is not None:
        ranks = plan.ranks_per_layer
        result["ranks_per_layer"] = [pair and list(pair) for pair in ranks]
        shown = ", ".join("whole" if pair is None else f"{pair[0]}+{pair[1]}" for pair in ranks)
        text += f", ranks {shown}"
    if plan.k_policy is not None:
        result["k_policy"] = plan.k_policy.name
        text += f", k by {plan.k_policy.name}"
    report(result, text, as_json=as_json)
