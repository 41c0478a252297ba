"""``edgemoe bench``: how fast a bundle loads, reads and writes."""

import click


@click.command()
def bench() -> None:
    """x."""
