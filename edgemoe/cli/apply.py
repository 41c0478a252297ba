"""``edgemoe apply``: a plan, carried out on its checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from edgemoe.cli.extras import needs
from edgemoe.cli.options import PATH, force_option, output_option, report, reporting, span

if TYPE_CHECKING:
    from pathlib import Path


@click.command()
@click.argument("model", type=PATH)
@click.option("--plan", "plan_path", type=PATH, required=True, metavar="PLAN")
@output_option("Checkpoint directory")
@click.option(
    "--max-shard-gb",
    type=click.FloatRange(min=0, min_open=True),
    default=4.0,
    show_default=True,
    help="Size of the weight files, in 10^9 bytes.",
)
@force_option
@reporting
def apply(
    model: Path,
    plan_path: Path,
    output: Path,
    max_shard_gb: float,
    force: bool,
    as_json: bool,
) -> None:
    """Keep, narrow, merge and factor the experts of MODEL as a plan says.

    One decoder layer is in memory at a time. When it is interrupted, the same command goes on
    after the last finished layer or weight file.
    """
    needs("export")
    from edgemoe.apply.in_memory import apply_plan
    from edgemoe.apply.streamed import apply_streamed
    from edgemoe.errors import StreamingError
    from edgemoe.models import load_model, read_shape, save_model
    from edgemoe.plans.plan import Plan
    from edgemoe.staging import refuse_existing, refuse_inputs_inside, staged_directory

    refuse_existing(output, force=force, directory=True)
    refuse_inputs_inside(output, model, plan_path)
    plan = Plan.load(plan_path)
    shape = read_shape(model)
    plan.validate(shape)
    try:
        applied = apply_streamed(
            model, plan, output, max_shard_bytes=int(max_shard_gb * 1e9), force=force
        )
        family = applied.family
    except StreamingError as error:
        click.echo(f"{error} The whole model is loaded instead.", err=True)
        pruned = apply_plan(load_model(model), plan)
        with staged_directory(output, force=force) as staged:
            save_model(pruned, staged, source=model)
        family = pruned.family
    counts, ranks = plan.experts_per_layer, plan.ranks_per_layer
    result: dict[str, Any] = {
        "output": output,
        "experts_per_layer": list(counts),
        "family": family,
    }
    text = f"{output}: {family}, experts per layer {', '.join(map(str, counts))}"
    if plan.is_narrowing:
        widths = plan.widths(shape)
        result["widths_per_layer"] = list(widths)
        text += f", stored {span(widths)} neurons wide"
    if plan.factors is not None:
        result["ranks_per_layer"] = [pair and list(pair) for pair in ranks]
        shown = ", ".join("whole" if pair is None else f"{pair[0]}+{pair[1]}" for pair in ranks)
        text += f", ranks {shown}"
    if plan.k_policy is not None:
        result["k_policy"] = plan.k_policy.name
        text += f", k by {plan.k_policy.name}"
    report(result, text, as_json=as_json)
