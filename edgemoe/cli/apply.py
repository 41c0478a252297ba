"""``edgemoe apply``: a plan, carried out on its checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from edgemoe.cli.extras import needs
from edgemoe.cli.options import PATH, force_option, output_option, report, reporting

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
    """Keep and merge the experts of MODEL as a plan says.

    One decoder layer is in memory at a time. When it is interrupted, the same command goes on
    after the last finished weight file.
    """
    needs("export")
    from edgemoe.errors import StreamingError
    from edgemoe.models import load_model, read_shape, save_model
    from edgemoe.plans.plan import Plan
    from edgemoe.prune.apply import apply_plan
    from edgemoe.prune.apply_streamed import apply_streamed
    from edgemoe.staging import refuse_existing, refuse_inputs_inside, staged_directory

    refuse_existing(output, force=force, directory=True)
    refuse_inputs_inside(output, model, plan_path)
    plan = Plan.load(plan_path)
    plan.validate(read_shape(model))
    try:
        applied = apply_streamed(
            model, plan, output, max_shard_bytes=int(max_shard_gb * 1e9), force=force
        )
        family, counts = applied.family, applied.experts_per_layer
    except StreamingError as error:
        click.echo(f"{error} The whole model is loaded instead.", err=True)
        pruned = apply_plan(load_model(model), plan)
        with staged_directory(output, force=force) as staged:
            save_model(pruned, staged, source=model)
        family, counts = pruned.family, pruned.experts_per_layer
    report(
        {"output": output, "experts_per_layer": list(counts), "family": family},
        f"{output}: {family}, experts per layer {', '.join(map(str, counts))}",
        as_json=as_json,
    )
