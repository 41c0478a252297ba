"""``edgemoe export``: the whole road from a checkpoint to a bundle."""

import click


@click.command()
def export() -> None:
    """x."""
