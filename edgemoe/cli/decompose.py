"""``edgemoe decompose``: ranks for the experts that a task keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from edgemoe.cli.extras import needs
from edgemoe.cli.options import PATH, force_option, output_option, report, reporting

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


@click.command()
@click.argument("model", type=PATH)
@click.option("--stats", type=PATH, required=True, metavar="STATS")
@click.option("--task", required=True, metavar="NAME", help="A task of the statistics.")
@click.option("--method", required=True, metavar="M", help="shared-basis, svd or svd-whitened.")
@click.option(
    "--param-ratio",
    type=float,
    required=True,
    metavar="R",
    help="Fraction of the parameters of the routed experts that may be stored, (0, 1]; of "
    "those that --plan keeps.",
)
@click.option(
    "--plan",
    "plan_path",
    type=PATH,
    metavar="PLAN",
    help="Plan of `edgemoe prune`: what it keeps and merges is factored; all experts without.",
)
@click.option(
    "--set",
    "options",
    multiple=True,
    metavar="NAME=VALUE",
    help="An option, repeatable: importance=uniform, frequency, reap or loss (ranks within a "
    "layer), layers=equal or loss (ranks across layers), multiple=8 (what divides ranks); for "
    "svd-whitened also tokens=8192 (of the sample) and prior_tokens=64; for shared-basis "
    "multiple=32, tokens=8192 and prior_tokens=1.",
)
@output_option("Plan")
@force_option
@reporting
def decompose(
    model: Path,
    stats: Path,
    task: str,
    method: str,
    param_ratio: float,
    plan_path: Path | None,
    options: tuple[str, ...],
    output: Path,
    force: bool,
    as_json: bool,
) -> None:
    """Decide the ranks of MODEL's experts. No weight is moved: `edgemoe apply` factors them.

    The plan of svd-whitened holds tokens of the statistics, which `edgemoe apply` runs MODEL's
    layers on: whoever has the plan can read them.
    """
    needs("export")
    from edgemoe.apply.checks import refuse_changes
    from edgemoe.apply.expert_tensors import planned_tensors
    from edgemoe.calibrate.statistics import Statistics
    from edgemoe.decompose.decision import add_ranks, read_options
    from edgemoe.errors import StatisticsError
    from edgemoe.layerwise.provider import open_layers
    from edgemoe.models.checkpoint import read_structure
    from edgemoe.models.fingerprint import fingerprint_checkpoint
    from edgemoe.plans.keep_all import keep_all
    from edgemoe.plans.plan import Plan
    from edgemoe.staging import refuse_existing, refuse_inputs_inside

    refuse_existing(output, force=force, directory=False)
    refuse_inputs_inside(output, model, stats)
    chosen = read_options(method, options)
    structure = read_structure(model)
    refuse_changes(structure)
    plan = keep_all(structure.shape) if plan_path is None else Plan.load(plan_path)
    sha256 = fingerprint_checkpoint(model)
    plan.validate(structure.shape, sha256)
    statistics = Statistics.load(stats)
    if statistics.checkpoint_sha256 != sha256:
        raise StatisticsError(
            f"statistics must be of the checkpoint that is factored, got {stats} of checkpoint "
            f"{statistics.checkpoint_sha256[:12]} for {model}. Calibrate {model}."
        )
    found = add_ranks(
        plan,
        structure.layers,
        statistics,
        task,
        method,
        param_ratio,
        open_layers=lambda: open_layers(model),
        prepare=planned_tensors,
        options=chosen,
    )
    found.plan.save(output, force=force)
    ranks = [pair and list(pair) for pair in found.plan.ranks_per_layer]
    result: dict[str, Any] = {
        "output": output,
        "sha256": found.plan.sha256,
        "method": method,
        "task": task,
        "param_ratio": param_ratio,
        "param_ratio_reached": found.ratio,
        "expert_parameters_before": found.parameters_before,
        "expert_parameters_after": found.parameters_after,
        "experts_per_layer": list(found.plan.experts_per_layer),
        "ranks_per_layer": ranks,
    }
    report(result, _text(result), as_json=as_json)


def _text(result: Mapping[str, Any]) -> str:
    before, after = result["expert_parameters_before"], result["expert_parameters_after"]
    ranks = ", ".join(f"{up}+{down}" for up, down in result["ranks_per_layer"])
    return (
        f"{result['output']}: {result['method']} for {result['task']}\n"
        f"experts' parameters: {before:,} before, {after:,} after: "
        f"{result['param_ratio_reached']:.4f}, {result['param_ratio']} asked\n"
        f"ranks per layer, up + down: {ranks}"
    )
