"""`edgemoe export`: the whole pipeline from a checkpoint to a bundle."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from edgemoe.api.extras import needs
from edgemoe.cli.options import (
    PATH,
    command,
    force_option,
    output_option,
    report,
    reporting,
)
from edgemoe.disk import human_bytes
from edgemoe.progress_lines import StageLines
from edgemoe.tasks import split_task_arguments
from edgemoe_runtime.bundle.names import PRECISIONS, TARGETS

if TYPE_CHECKING:
    from pathlib import Path

    from edgemoe_exporters.request import ExportReport
    from edgemoe_runtime.bundle.k_ladder import KRung


@command(
    "edgemoe export demo/moe --target cpu --task code=demo/tasks/code.train.jsonl --keep 0.5"
    " -o bundle",
    "edgemoe export moe-code --target jetson-orin -o bundle",
)
@click.argument("model", type=PATH)
@output_option("Bundle directory")
@click.option(
    "--target",
    type=click.Choice(TARGETS),
    required=True,
    help="Device, or engine, that the bundle is for.",
)
@click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    help="Of the weights; that of the target without.",
)
@click.option(
    "--task",
    "tasks",
    multiple=True,
    metavar="NAME=FILE",
    help="Data of a task, JSON Lines. Repeatable: the bundle has one graph for each.",
)
@click.option(
    "--plan",
    "plans",
    multiple=True,
    metavar="NAME=PLAN",
    help="Plan of a task, instead of one that --method makes. Repeatable.",
)
@click.option(
    "--keep", type=float, metavar="F", help="Fraction of each layer's experts to keep, (0, 1]."
)
@click.option(
    "--max-drop",
    type=float,
    metavar="D",
    help="Fail where a score gets worse by more: 0.05 is 5% of perplexity or 5 points.",
)
@click.option(
    "--method",
    default="reap",
    show_default=True,
    help="Pruning method for tasks of --task, as of `edgemoe prune`.",
)
@click.option(
    "--seed",
    type=int,
    default=0,
    show_default=True,
    help="Seed of methods that draw at random.",
)
@click.option(
    "--calibration-tokens",
    type=click.IntRange(1),
    default=16_384,
    show_default=True,
    help="Tokens of each task to calibrate on.",
)
@click.option(
    "--held-out-tokens",
    type=click.IntRange(1),
    default=8_192,
    show_default=True,
    help="Tokens of each task to score before and after.",
)
@click.option(
    "--ladder/--no-ladder",
    default=True,
    show_default=True,
    help="Measure a k ladder for tasks with data: the caps of experts per token that trade "
    "quality for time.",
)
@click.option(
    "--static-shapes",
    is_flag=True,
    help="TensorRT: no data-dependent shapes; a smaller k saves no time then. For a TensorRT "
    "that refuses or slows down the other graph.",
)
@click.option(
    "--memory-limit",
    type=click.FloatRange(0),
    metavar="GB",
    help="Largest checkpoint (in float32) and graph to open as a whole; those that are larger "
    "are read layer by layer. Half of what is free without.",
)
@force_option
@reporting
def export(
    model: Path,
    output: Path,
    target: str,
    precision: str | None,
    tasks: tuple[str, ...],
    plans: tuple[str, ...],
    keep: float | None,
    max_drop: float | None,
    method: str,
    seed: int,
    calibration_tokens: int,
    held_out_tokens: int,
    ladder: bool,
    static_shapes: bool,
    memory_limit: float | None,
    force: bool,
    as_json: bool,
) -> None:
    """Write MODEL as a bundle that runs on a device.

    With --task it is calibrated, pruned, exported and evaluated in one go: three quarters of
    the examples are calibrated on, one quarter is held out and scores the result. Without
    --task the model is exported as it is. A checkpoint larger than memory is read layer by
    layer; when that is interrupted, the same command goes on from what is finished.
    """
    needs("export", "ort")
    from edgemoe_exporters.export import export_bundle
    from edgemoe_exporters.request import ExportRequest
    from edgemoe_exporters.request_inputs import count_stages

    request = ExportRequest(
        model=model,
        output=output,
        target=target,
        precision=precision,
        tasks=split_task_arguments(tasks),
        plans=split_task_arguments(plans, of="plan"),
        keep=keep,
        max_drop=max_drop,
        force=force,
        method=method,
        seed=seed,
        calibration_tokens=calibration_tokens,
        held_out_tokens=held_out_tokens,
        ladder=ladder,
        static_shapes=static_shapes,
        memory_limit_bytes=None if memory_limit is None else int(memory_limit * 1e9),
    )
    stages = StageLines(count_stages(request))
    exported = export_bundle(request, on_stage=stages.begin)
    stages.finish()
    report(exported.to_json(), _text(exported), as_json=as_json)


def _text(exported: ExportReport) -> str:
    from edgemoe_runtime.bundle.manifest_file import load_manifest

    size = exported.size
    lines = [
        f"{exported.output}: {exported.flavour} {exported.precision} for {exported.target}, "
        f"{human_bytes(size.total_bytes)}, of which {human_bytes(size.shared_bytes)} shared "
        f"(the checkpoint in fp32: {human_bytes(exported.checkpoint_bytes)})"
    ]
    kept = load_manifest(exported.output).tasks
    for name, task in exported.tasks.items():
        line = (
            f"  {name}: {sum(kept[name].experts_per_layer)} of {sum(exported.experts_before)} "
            f"experts, parity {task.parity.max_abs_logit_difference:.2g}"
        )
        quality = task.quality
        if quality is not None and quality.before is not None and quality.after is not None:
            line += (
                f", {quality.before['metric']} {quality.before['value']:.4g} before, "
                f"{quality.after['value']:.4g} after"
            )
        lines.append(line)
        lines += [f"    {_show_rung(rung)}" for rung in task.k_ladder or ()]
    return "\n".join([*lines, *(f"  note: {note}" for note in exported.notes)])


def _show_rung(rung: KRung) -> str:
    """Say what a rung of the k ladder is, loses and costs."""
    layers = max(len(rung.k_cap), 1)
    shown = f"rung {rung.name}: {sum(rung.k_cap) / layers:.3g} experts per token at most"
    if rung.quality is not None:
        low, high = rung.quality.drop_ci95
        shown += f", drop {rung.quality.drop:.3f} [{low:.3f}, {high:.3f}]"
    if rung.cost is not None:
        shown += f", time {rung.cost.decode:.2f} (prompts {rung.cost.prefill:.2f})"
    return shown
