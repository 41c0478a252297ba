"""``edgemoe carve``: a dense checkpoint becomes a Mixture of Experts."""

import click


@click.command()
def carve() -> None:
    """x."""
