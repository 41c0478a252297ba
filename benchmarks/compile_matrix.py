"""How long does TensorRT-RTX take per GPU, and how large are the engines?

    edgemoe export demo/moe -o rtx --target tensorrt-rtx --precision fp16
    python -m benchmarks.compile_matrix rtx

Builds every engine of a bundle again, for each GPU of the target, then once more to time the
cache. No GPU is needed, and none is used: how fast the engines run is another question.
Markdown goes to stdout, progress to stderr.
"""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgemoe.errors import EdgemoeError
from edgemoe.progress import track
from edgemoe_exporters.compiler.compile import compile_bundle
from edgemoe_exporters.compiler.targets import TARGETS
from edgemoe_runtime.bundle.manifest_file import load_manifest
from edgemoe_runtime.bundle.names import SHARED_WEIGHTS_FILE, weights_file
from edgemoe_runtime.errors import EdgemoeRuntimeError

if TYPE_CHECKING:
    from edgemoe_runtime.bundle.manifest import Manifest

_TARGET = "tensorrt-rtx"
_MB = 1e6


@dataclass(frozen=True, kw_only=True)
class Row:
    """One engine.

    Attributes:
        task: Task of the bundle.
        compute_capability: GPU.
        build_s: Wall clock of the build.
        cpu_s: Processor time of the build, all threads.
        engine_bytes: Size of the engine.
        weights_bytes: Size of the weights that the graph reads.
        cached_s: Wall clock of finding it in the cache, with the bundle verified.
    """

    task: str
    compute_capability: int
    build_s: float
    cpu_s: float
    engine_bytes: int
    weights_bytes: int
    cached_s: float


def measure(bundle: Path, task: str, compute_capability: int, weights_bytes: int) -> Row:
    """Build one engine, then find it."""
    cpu = time.process_time()
    (engine,) = compile_bundle(
        bundle, _TARGET, task=task, compute_capabilities=[compute_capability], force=True
    )
    cpu = time.process_time() - cpu
    started = time.perf_counter()
    compile_bundle(bundle, _TARGET, task=task, compute_capabilities=[compute_capability])
    return Row(
        task=task,
        compute_capability=compute_capability,
        build_s=engine.seconds,
        cpu_s=cpu,
        engine_bytes=engine.size_bytes,
        weights_bytes=weights_bytes,
        cached_s=time.perf_counter() - started,
    )


def render(rows: list[Row], manifest: Manifest) -> str:
    """Return a markdown table."""
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    model = manifest.model
    lines = [
        f"{model.name}: {model.num_layers} layers, {manifest.precision}; peak memory of the "
        f"process {peak_gb:.1f} GB.",
        "",
        "| task | GPU | build s | CPU s | engine MB | engine / weights | from cache s |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.task} | SM{row.compute_capability} | {row.build_s:.1f} | {row.cpu_s:.1f} | "
        f"{row.engine_bytes / _MB:.1f} | {row.engine_bytes / row.weights_bytes:.2f} | "
        f"{row.cached_s:.2f} |"
        for row in rows
    ]
    return "\n".join(lines)


@click.command()
@click.argument("bundle", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--compute-capability", "capabilities", type=int, multiple=True, help="Only this GPU."
)
def main(bundle: Path, capabilities: tuple[int, ...]) -> None:
    """Build all engines of BUNDLE and print a table."""
    try:
        manifest = load_manifest(bundle)
        jobs = [
            (task, capability)
            for task in sorted(manifest.tasks)
            for capability in capabilities or TARGETS[_TARGET].capabilities
        ]
        rows = []
        for task, capability in track(jobs, "Building engines"):
            names = {SHARED_WEIGHTS_FILE, weights_file(task)} & set(manifest.files)
            weights = sum(manifest.files[name].size for name in names)
            rows.append(measure(bundle, task, capability, max(1, weights)))
    except (EdgemoeError, EdgemoeRuntimeError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(render(rows, manifest))


if __name__ == "__main__":
    main()
