"""``edgemoe carve``: a dense checkpoint becomes a Mixture of Experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from edgemoe.cli.extras import needs
from edgemoe.cli.options import PATH, force_option, output_option, report, reporting

if TYPE_CHECKING:
    from pathlib import Path


@click.command()
@click.argument("dense", type=PATH)
@output_option("Checkpoint directory")
@click.option("--experts", type=int, default=16, show_default=True, metavar="N")
@click.option(
    "--shared-fraction",
    type=float,
    default=1 / 3,
    metavar="F",
    help="Share of the neurons that every token uses, (0, 1).  [default: 1/3]",
)
@click.option("--top-k", type=int, default=6, show_default=True, metavar="K")
@click.option(
    "--data",
    type=PATH,
    metavar="FILE",
    help="Calibration text, plain or JSON Lines.  [default: topics of Python's manual]",
)
@click.option(
    "--learned",
    type=PATH,
    metavar="FILE",
    help="Rebuild a distilled MoE from what was learned on DENSE; the shape is the file's.",
)
@click.option("--max-tokens", type=int, default=8192, show_default=True, metavar="N")
@click.option("--seed", type=int, default=0, show_default=True, metavar="N")
@force_option
@reporting
def carve(
    dense: Path,
    output: Path,
    experts: int,
    shared_fraction: float,
    top_k: int,
    data: Path | None,
    learned: Path | None,
    max_tokens: int,
    seed: int,
    force: bool,
    as_json: bool,
) -> None:
    """Split the feed-forward layers of DENSE, a directory or GGUF file, into experts."""
    needs("export")
    from edgemoe.carve.carve import CarveOptions, carve_checkpoint, rebuild_checkpoint

    if learned is not None:
        if data is not None:
            raise click.UsageError("--learned needs no calibration: leave out --data.")
        carved = rebuild_checkpoint(dense, output, learned=learned, force=force)
    else:
        options = CarveOptions(
            experts=experts,
            shared_fraction=shared_fraction,
            top_k=top_k,
            max_tokens=max_tokens,
            seed=seed,
        )
        carved = carve_checkpoint(
            dense, output, texts=_read_texts(data), options=options, force=force
        )
    report(
        {"output": output, **carved.to_dict()},
        f"{output}: {carved.layers} layers of {carved.experts} experts of {carved.expert_size} "
        f"neurons and {carved.shared_size} shared ones, top {carved.top_k}: "
        f"{carved.active_fraction:.0%} of the feed-forward neurons work on a token",
        as_json=as_json,
    )


def _read_texts(data: Path | None) -> list[str]:
    from edgemoe.tasks import TaskFile

    if data is None:
        import pydoc_data.topics

        return [text for _, text in sorted(pydoc_data.topics.topics.items())]
    if data.suffix == ".jsonl":
        return [record.calibration_text for record in TaskFile.load("data", data).records]
    try:
        return [data.read_text(encoding="utf-8")]
    except UnicodeDecodeError as error:
        raise click.FileError(str(data), hint="calibration text must be UTF-8.") from error
