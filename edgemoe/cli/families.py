"""`edgemoe families`: which model families work, tried on this installation."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from edgemoe.api.extras import needs
from edgemoe.cli.options import PATH, command, report, reporting

if TYPE_CHECKING:
    from pathlib import Path


@command("edgemoe families", "edgemoe families qwen2_moe --check --no-engine")
@click.argument("names", nargs=-1, metavar="[FAMILY]...")
@click.option("--check", is_flag=True, help="Try each on a tiny random checkpoint.")
@click.option("--no-graphs", is_flag=True, help="With --check: do not export.")
@click.option("--no-engine", is_flag=True, help="With --check: do not build a TensorRT engine.")
@click.option(
    "--markdown", type=PATH, metavar="FILE", help="With --check: write the table to FILE."
)
@reporting
def families(
    names: tuple[str, ...],
    check: bool,
    no_graphs: bool,
    no_engine: bool,
    markdown: Path | None,
    as_json: bool,
) -> None:
    """List the model families that edgemoe is tested with, or try FAMILYs.

    A family is named by its model_type in config.json. With --check, each is built with random
    weights, pruned, saved, opened again, exported and compiled; families that are not listed
    can be tried as well.
    """
    needs("export")
    from edgemoe.models.registry import FAMILIES, find_family
    from edgemoe.progress import track

    chosen = names or FAMILIES
    if not check:
        from edgemoe_exporters.tracing.prepare.model import WITHOUT_GRAPH

        rows = {name: name not in WITHOUT_GRAPH for name in FAMILIES}
        lines = [
            f"{name}{'' if graph else '  (no graphs yet)'}" for name, graph in rows.items()
        ]
        report({"families": rows}, "\n".join(lines), as_json=as_json)
        return
    for name in chosen:
        find_family(name)
    from edgemoe_exporters.families.check import check_family
    from edgemoe_exporters.families.table import render_table

    reports = [
        check_family(name, graphs=not no_graphs, engine=not no_engine)
        for name in track(list(chosen), "try families")
    ]
    table = render_table(reports)
    if markdown is not None:
        markdown.write_text(table, encoding="utf-8")
    failed = [found.family for found in reports if found.failed]
    report({"families": [asdict(found) for found in reports]}, table.rstrip(), as_json=as_json)
    if failed:
        raise click.exceptions.Exit(1)
