"""`edgemoe compile`: a bundle's graphs to TensorRT engines."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from edgemoe.api.checks import check_bundle
from edgemoe.cli.options import PATH, command, report, reporting
from edgemoe.disk import human_bytes
from edgemoe_runtime.bundle.names import TARGETS

if TYPE_CHECKING:
    from pathlib import Path


@command(
    "edgemoe compile bundle --target tensorrt-rtx",
    "edgemoe compile bundle --target jetson-orin --task code",
    name="compile",
)
@click.argument("bundle", type=PATH)
@click.option(
    "--target",
    type=click.Choice(TARGETS),
    required=True,
    help="Engine, or board, to build for.",
)
@click.option("--task", metavar="NAME", help="Build the engine of this task only; all without.")
@click.option(
    "--compute-capability",
    "capabilities",
    type=click.IntRange(10),
    multiple=True,
    metavar="NN",
    help="Build for this GPU only, such as 86 for SM 8.6. Repeatable.",
)
@click.option(
    "--max-batch", type=click.IntRange(1), help="Largest batch of the optimization profile."
)
@click.option(
    "--max-sequence", type=click.IntRange(1), help="Most new tokens in one call (prefill)."
)
@click.option(
    "--max-length", type=click.IntRange(1), help="Longest sequence in tokens, cache and all."
)
@click.option("--force", is_flag=True, help="Build engines again that are cached.")
@reporting
def compile_(
    bundle: Path,
    target: str,
    task: str | None,
    capabilities: tuple[int, ...],
    max_batch: int | None,
    max_sequence: int | None,
    max_length: int | None,
    force: bool,
    as_json: bool,
) -> None:
    """Build BUNDLE's TensorRT engines into its cache.

    TensorRT for RTX builds for every GPU without one; the engines of TensorRT and of Jetson
    boards have to be built on the device itself.
    """
    check_bundle(bundle)
    from edgemoe_exporters.compiler.compile import compile_bundle

    engines = compile_bundle(
        bundle,
        target,
        task=task,
        compute_capabilities=capabilities or None,
        max_batch=max_batch,
        max_sequence=max_sequence,
        max_length=max_length,
        force=force,
    )
    lines = [
        f"{engine.path.name}: {human_bytes(engine.size_bytes)}, "
        + ("cached" if engine.cached else f"built in {engine.seconds:.1f} s ({engine.reason})")
        for engine in engines
    ]
    report(
        {"bundle": bundle, "target": target, "engines": [asdict(item) for item in engines]},
        "\n".join(lines),
        as_json=as_json,
    )
