"""``edgemoe run``: a bundle answers a prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from edgemoe.cli.options import PATH, report, reporting

if TYPE_CHECKING:
    from pathlib import Path


@click.command()
@click.argument("bundle", type=PATH)
@click.option("--prompt", required=True, help="Text to continue.")
@click.option("--task", metavar="NAME", help="The task, where the bundle has several.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=64, show_default=True)
@click.option("--k-cap", type=click.IntRange(1), help="At most so many experts per token.")
@click.option("--temperature", type=click.FloatRange(0), default=0.0, help="0 is greedy.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0)
@click.option(
    "--stop", multiple=True, metavar="TEXT", help="Stop before this text. Repeatable."
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--threads", type=click.IntRange(1), help="Threads of the engine.")
@click.option("--backend", metavar="NAME", help="Use this engine only.")
@click.option("--stream", is_flag=True, help="Print the text as it comes.")
@reporting
def run() -> None:
    """Continue a prompt with BUNDLE."""
