"""`edgemoe decompose`: ranks for the experts that a task keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from edgemoe.api.decompose import decompose as decide
from edgemoe.cli.options import (
    PATH,
    command,
    force_option,
    options_of,
    output_option,
    report,
    reporting,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

option = options_of(decide)


@command(
    "edgemoe decompose demo/moe --stats code.stats --task code --method svd-whitened"
    " --param-ratio 0.7 -o code.plan.json",
)
@click.argument("model", type=PATH)
@option(
    "--stats",
    "statistics",
    type=PATH,
    metavar="STATS",
    help="Statistics of MODEL, as `edgemoe calibrate` writes them.",
)
@option("--task", metavar="NAME", help="A task of the statistics.")
@option("--method", metavar="M", help="shared-basis, svd or svd-whitened.")
@option(
    "--param-ratio",
    type=float,
    metavar="R",
    help="Fraction of the parameters of the routed experts that may be stored, (0, 1]; of "
    "those that --plan keeps.",
)
@option(
    "--plan",
    type=PATH,
    metavar="PLAN",
    help="Plan of `edgemoe prune`: what it keeps and merges is factored; all experts without.",
)
@option(
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
def decompose(as_json: bool, **given: Any) -> None:
    """Decide the ranks of a low-rank factorisation of MODEL's experts.

    No weight is moved: `edgemoe apply` factors the experts. The plan of svd-whitened holds
    tokens of the statistics, which `edgemoe apply` runs MODEL's layers on: whoever has the plan
    can read them.
    """
    found = decide(**given)
    result: dict[str, Any] = {
        "output": given["output"],
        "sha256": found.plan.sha256,
        "method": given["method"],
        "task": given["task"],
        "param_ratio": given["param_ratio"],
        "param_ratio_reached": found.ratio,
        "expert_parameters_before": found.parameters_before,
        "expert_parameters_after": found.parameters_after,
        "experts_per_layer": list(found.plan.experts_per_layer),
        "ranks_per_layer": [pair and list(pair) for pair in found.plan.ranks_per_layer],
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
