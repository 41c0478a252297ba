"""`edgemoe carve`: a dense checkpoint becomes a Mixture of Experts."""

from __future__ import annotations

from typing import Any

import click

from edgemoe.api.carve import carve as split
from edgemoe.cli.options import (
    PATH,
    command,
    force_option,
    options_of,
    output_option,
    report,
    reporting,
)

option = options_of(split)


@command("edgemoe carve demo/dense --experts 16 --top-k 6 -o moe")
@click.argument("dense", type=PATH)
@output_option("Checkpoint directory")
@option("--experts", type=int, metavar="N", help="Routed experts of each layer.")
@option(
    "--shared-fraction",
    type=float,
    show_default=False,
    metavar="F",
    help="Fraction of the intermediate channels that form the shared expert, (0, 1).  "
    "[default: 1/3]",
)
@option("--top-k", type=int, metavar="K", help="Routed experts per token.")
@option(
    "--data",
    type=PATH,
    metavar="FILE",
    help="Calibration text, plain or JSON Lines.  [default: topics of Python's manual]",
)
@option(
    "--learned",
    type=PATH,
    metavar="FILE",
    help="Rebuild a distilled MoE from what was learned on DENSE; the shape is the file's.",
)
@option("--max-tokens", type=int, metavar="N", help="Calibration tokens at most.")
@option("--seed", type=int, metavar="N", help="Of the windows and the first cluster centres.")
@force_option
@reporting
def carve(as_json: bool, **given: Any) -> None:
    """Split the feed-forward layers of DENSE into shared and routed experts.

    DENSE is a checkpoint directory or a GGUF file. Intermediate channels are clustered by what
    activates them (CMoE); nothing is trained.
    """
    carved = split(**given)
    report(
        {"output": given["output"], **carved.to_dict()},
        f"{given['output']}: {carved.layers} layers of {carved.experts} experts of "
        f"{carved.expert_size} neurons and {carved.shared_size} shared ones, top "
        f"{carved.top_k}: {carved.active_fraction:.0%} of the feed-forward neurons work on a "
        "token",
        as_json=as_json,
    )
