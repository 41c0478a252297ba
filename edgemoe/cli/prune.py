"""``edgemoe prune``: statistics of a task to a plan."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import click

from edgemoe.cli.extras import needs
from edgemoe.cli.options import PATH, force_option, output_option, report, reporting, span
from edgemoe.cli.workers import choose_place

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from edgemoe.oracle.remote import Crew
    from edgemoe.parallel.workers import Place


def parse_weights(texts: tuple[str, ...]) -> dict[str, float]:
    """Turn ``NAME`` and ``NAME=WEIGHT`` into weights by name."""
    weights: dict[str, float] = {}
    for text in texts:
        name, equals, number = text.partition("=")
        try:
            weight = float(number) if equals else 1.0
        except ValueError as error:
            raise click.BadParameter(
                f"a weight must be a number, got {text!r}.", param_hint="--task"
            ) from error
        if name in weights:
            raise click.BadParameter(
                f"a task must come once, got {name!r}.", param_hint="--task"
            )
        weights[name] = weight
    return weights


@click.command()
@click.argument("model", type=PATH)
@click.option("--stats", type=PATH, required=True, metavar="STATS")
@click.option(
    "--task",
    "tasks",
    required=True,
    multiple=True,
    metavar="NAME[=WEIGHT]",
    help="A task of the statistics; several, each with its weight (1 by default), are mixed.",
)
@click.option(
    "--method",
    required=True,
    metavar="M",
    help="frequency, man, moe-i2, msan, naee, random, reap, ream, seer or uncurl; camera and "
    "heapr keep all experts and choose their neurons.",
)
@click.option(
    "--keep",
    type=float,
    metavar="F",
    help="Fraction of each layer's experts to keep, or of all neurons with camera and heapr, "
    "(0, 1].",
)
@click.option(
    "--keep-experts",
    metavar="N",
    help="Experts to keep in each layer: one number, a number per layer with commas between "
    "them, or the file of a JSON list.",
)
@click.option(
    "--layers",
    type=click.Choice(["uniform", "owl"]),
    default="uniform",
    show_default=True,
    help="owl: as many experts in all, more of them in layers whose weights have more outliers "
    "on the task. Its options: --set owl-multiple=5 --set owl-range=0.08.",
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--set",
    "options",
    multiple=True,
    metavar="NAME=VALUE",
    help="An option of the method, such as population=50 for moe-i2; repeatable. A wrong name "
    "lists them.",
)
@click.option(
    "--workers",
    type=click.IntRange(1),
    metavar="N",
    help="moe-i2 and naee: search N layers at once, on processes of this machine or on the Ray "
    "cluster; each process loads the model.",
)
@click.option(
    "--ray",
    "ray_address",
    metavar="ADDRESS",
    help="moe-i2 and naee: put the workers on a Ray cluster: host:port, auto for the one this "
    "machine is in, local to start one here. One worker per machine unless --workers says "
    "otherwise.",
)
@click.option(
    "--threads",
    type=click.IntRange(1),
    metavar="N",
    help="CPU threads of each process; the last bits of what is measured depend on it.",
)
@output_option("Plan")
@force_option
@reporting
def prune(
    model: Path,
    stats: Path,
    tasks: tuple[str, ...],
    method: str,
    keep: float | None,
    keep_experts: str | None,
    layers: str,
    seed: int,
    options: tuple[str, ...],
    workers: int | None,
    ray_address: str | None,
    threads: int | None,
    output: Path,
    force: bool,
    as_json: bool,
) -> None:
    """Decide which experts, or which of their neurons, a task keeps. No weight is moved.

    Most methods read the statistics only; camera, heapr, moe-i2, naee and ream also run MODEL's
    layers on the tokens that are kept there, as --layers owl does.
    """
    if (keep is None) == (keep_experts is None):
        raise click.UsageError("give exactly one of --keep and --keep-experts.")
    needs("export", *(["ray"] if ray_address is not None else []))
    import torch

    from edgemoe.apply.checks import refuse_changes
    from edgemoe.calibrate.statistics import Statistics
    from edgemoe.errors import PlanError, StatisticsError
    from edgemoe.layerwise.provider import StreamedLayers, open_layers
    from edgemoe.models.checkpoint import read_structure
    from edgemoe.models.fingerprint import fingerprint_checkpoint
    from edgemoe.models.opening import open_streamed
    from edgemoe.oracle.oracle import LayerOracle
    from edgemoe.prune.keep import count_kept, parse_keep_experts
    from edgemoe.prune.registry import count_for, find_method, make_plan, read_options
    from edgemoe.staging import refuse_existing, refuse_inputs_inside

    refuse_existing(output, force=force, directory=False)
    refuse_inputs_inside(output, model, *filter(None, [stats]))
    try:
        asked = None if keep_experts is None else parse_keep_experts(keep_experts)
    except PlanError as error:
        raise click.BadParameter(str(error), param_hint="--keep-experts") from error
    chosen = read_options(method, [*_layers(layers, asked), *options])
    spread = workers is not None or ray_address is not None
    if spread and not find_method(method).spreads:
        raise click.UsageError(
            f"--workers and --ray cannot be used with {method}, which decides in one process."
        )
    if threads is not None:
        torch.set_num_threads(threads)
    weights = parse_weights(tasks)
    picks_neurons = find_method(method).picks_neurons
    if picks_neurons and asked is not None:
        raise PlanError(
            f"{method} must be told a fraction of the neurons, since it keeps all experts, got "
            f"--keep-experts {keep_experts}. Use --keep."
        )
    structure = read_structure(model)
    refuse_changes(structure)
    shape = structure.shape
    if keep is not None:
        counts = count_for(method, shape, keep)
    else:
        counts = count_kept(shape, keep_experts=asked)
    statistics = Statistics.load(stats)
    if statistics.checkpoint_sha256 != fingerprint_checkpoint(model):
        raise StatisticsError(
            f"statistics must be of the checkpoint that is pruned, got {stats} of checkpoint "
            f"{statistics.checkpoint_sha256[:12]} for {model}. Calibrate {model}."
        )
    with contextlib.ExitStack() as stack:
        place = choose_place(workers, ray_address)
        crew = stack.enter_context(_open_crew(place, model, threads)) if spread else None
        plan = make_plan(
            statistics,
            weights,
            method,
            counts,
            seed=seed,
            options=chosen,
            # Where workers have the model, this process needs none of it in memory.
            open_oracle=lambda windows: LayerOracle(
                open_layers(model) if crew is None else StreamedLayers(open_streamed(model)),
                windows,
                crew,
            ),
        )
    plan.save(output, force=force)
    kept = plan.experts_per_layer
    result: dict[str, Any] = {
        "output": output,
        "sha256": plan.sha256,
        "method": method,
        "task": plan.task,
        "experts_per_layer": list(kept),
        "experts_before": list(shape.experts_per_layer),
    }
    text = (
        f"{output}: {method} for {plan.task} keeps {sum(kept)} of "
        f"{sum(shape.experts_per_layer)} experts in {len(kept)} layers"
    )
    if picks_neurons:
        before, widths = shape.widths_per_layer, plan.widths(shape)
        result |= {"widths_per_layer": list(widths), "widths_before": list(before)}
        text += f", stored {span(widths)} of {span(before)} neurons wide"
    report(result, text, as_json=as_json)


def _layers(layers: str, asked: int | tuple[int, ...] | None) -> list[str]:
    """Turn ``--layers`` into an option of the method."""
    if layers == "uniform":
        return []
    if isinstance(asked, tuple):
        raise click.UsageError(
            f"--layers {layers} decides how many experts each layer keeps: give --keep, or one "
            "number to --keep-experts."
        )
    return [f"layers={layers}"]


@contextlib.contextmanager
def _open_crew(place: Place, model: Path, threads: int | None) -> Iterator[Crew]:
    from edgemoe.oracle.remote import Crew
    from edgemoe.parallel.agreement import threads_of
    from edgemoe.parallel.opening import open_workers
    from edgemoe.parallel.workers import Processes, RayCluster
    from edgemoe.sweep.memory_check import fits_whole

    # Refused before workers are there for nothing, where that is known.
    fits_whole(model, place.count if isinstance(place, Processes) else 1)
    with open_workers(place) as workers:
        is_here = not isinstance(place, RayCluster) or place.address == "local"
        yield Crew(
            workers=workers,
            model=model.resolve(),
            whole=fits_whole(model, workers.count if is_here else 1),
            threads=threads_of(place, threads),
        )
