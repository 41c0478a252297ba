"""``edgemoe calibrate``: checkpoint and task files to statistics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import click

from edgemoe.cli.extras import needs
from edgemoe.cli.options import PATH, force_option, output_option, report, reporting

if TYPE_CHECKING:
    from pathlib import Path

    from edgemoe.parallel.workers import Place


def parse_shard(_: click.Context, __: click.Parameter, value: str | None) -> tuple[int, int]:
    """Turn ``INDEX/OF`` into two integers."""
    if value is None:
        return (0, 1)
    index, _slash, count = value.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise click.BadParameter(
            f"must be INDEX/OF with INDEX < OF, such as 0/2, got {value!r}"
        )
    return int(index), int(count)


@click.command()
@click.argument("model", type=PATH)
@click.option(
    "--task", "tasks", multiple=True, required=True, metavar="NAME=FILE", help="Repeatable."
)
@output_option("Statistics file")
@click.option("--max-tokens", type=click.IntRange(1), help="Read so many tokens per task.")
@click.option(
    "--shard",
    metavar="INDEX/OF",
    callback=parse_shard,
    help="Read every OF-th line from INDEX on; merge-stats adds the shards up.",
)
@click.option(
    "--workers",
    type=click.IntRange(1),
    metavar="N",
    help="Read N shards at once, on processes of this machine or on the Ray cluster.",
)
@click.option(
    "--ray",
    "ray_address",
    metavar="ADDRESS",
    help="Put the workers on a Ray cluster: host:port, auto for the one this machine is in, "
    "local to start one here. One worker per machine unless --workers says otherwise.",
)
@click.option(
    "--threads",
    type=click.IntRange(1),
    metavar="N",
    help="CPU threads of each process; the last bits of the sums depend on it.",
)
@click.option(
    "--device",
    default="cpu",
    show_default=True,
    metavar="cpu|cuda|cuda:N|auto",
    help="Where layers compute; with several GPUs, workers take turns at them.",
)
@force_option
@reporting
def calibrate(
    model: Path,
    tasks: tuple[str, ...],
    output: Path,
    max_tokens: int | None,
    shard: tuple[int, int],
    workers: int | None,
    ray_address: str | None,
    threads: int | None,
    device: str,
    force: bool,
    as_json: bool,
) -> None:
    """Measure which experts of MODEL the tasks use.

    One decoder layer is in memory at a time. When it is interrupted, the same command goes on
    from the last finished layer. Several workers write the same file as one.
    """
    spread = workers is not None or ray_address is not None
    if spread and shard != (0, 1):
        raise click.UsageError("--shard cannot be used with --workers or --ray.")
    needs("export", *(["ray"] if ray_address is not None else []))
    import torch

    from edgemoe.calibrate.collect import collect
    from edgemoe.calibrate.shards import calibrate_in_shards
    from edgemoe.calibrate.streamed import calibrate_streamed
    from edgemoe.errors import StreamingError
    from edgemoe.models import load_model, load_tokenizer
    from edgemoe.models.device import device_here
    from edgemoe.staging import refuse_existing, refuse_inputs_inside
    from edgemoe.tasks import load_tasks

    refuse_existing(output, force=force, directory=False)
    task_files = load_tasks(tasks)
    refuse_inputs_inside(output, model, *(task.path for task in task_files))
    try:
        if spread:
            statistics = calibrate_in_shards(
                model,
                task_files,
                output,
                _place(workers, ray_address, device),
                max_tokens=max_tokens,
                device=device,
                threads=threads,
                force=force,
            )
        else:
            if threads is not None:
                torch.set_num_threads(threads)
            statistics = calibrate_streamed(
                model,
                task_files,
                output,
                max_tokens=max_tokens,
                shard=shard,
                device=device_here(device),
                force=force,
            )
    except StreamingError as error:
        click.echo(f"{error} The whole model is loaded instead, in this process.", err=True)
        whole = load_model(model)
        whole.model.to(cast("Any", device_here(device)))
        statistics = collect(
            whole,
            task_files,
            load_tokenizer(model),
            max_tokens=max_tokens,
            shard=shard,
        )
        statistics.save(output, force=force)
    tokens = {name: task.tokens for name, task in statistics.tasks.items()}
    counted = ", ".join(f"{name} {count} tokens" for name, count in tokens.items())
    report(
        {
            "output": output,
            "checkpoint_sha256": statistics.checkpoint_sha256,
            "sha256": statistics.sha256,
            "moe_layers": len(statistics.shape.layers),
            "tokens": tokens,
        },
        f"{output}: {len(statistics.shape.layers)} MoE layers over {counted}",
        as_json=as_json,
    )


def _place(workers: int | None, ray_address: str | None, device: str) -> Place:
    from edgemoe.models.device import device_here
    from edgemoe.parallel.workers import Processes, RayCluster

    if ray_address is None:
        device_here(device)  # refused now, not in a worker
        return Processes(workers or 1)
    gpus = None if device == "auto" else device != "cpu"
    return RayCluster(address=ray_address, count=workers, gpus=gpus)
