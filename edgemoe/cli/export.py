"""`edgemoe export`: the whole pipeline from a checkpoint to a bundle."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from edgemoe.api.extras import needs
from edgemoe.cli.export_text import describe_export
from edgemoe.cli.options import (
    PATH,
    command,
    force_option,
    output_option,
    report,
    reporting,
)
from edgemoe.progress_lines import StageLines
from edgemoe.tasks import split_task_arguments
from edgemoe_runtime.bundle.names import PRECISIONS, TARGETS

if TYPE_CHECKING:
    from pathlib import Path

    from edgemoe_exporters.request import Keep


class KeepType(click.ParamType):  # type: ignore[type-arg]  # generic in click 8.4 only
    """A fraction, or `auto`."""

    name = "keep"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Keep:
        """Read what was given; the request checks the range."""
        if value == "auto":
            return "auto"
        try:
            return float(value)
        except ValueError:
            self.fail(f"must be a number in (0, 1] or auto, got {value!r:.80}", param, ctx)


@command(
    "edgemoe export demo/moe --target cpu --task code=demo/tasks/code.train.jsonl --keep 0.5"
    " -o bundle",
    "edgemoe export demo/moe --target cpu --task code=demo/tasks/code.train.jsonl --keep auto"
    " --max-drop 0.2 --recover least-squares -o bundle",
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
    "--from",
    "recovered",
    multiple=True,
    metavar="NAME=CHECKPOINT",
    help="Weights of a task: a checkpoint that was made from MODEL by `edgemoe apply` and "
    "`edgemoe recover`. What is equal to MODEL's is stored once. Repeatable.",
)
@click.option(
    "--recover",
    multiple=True,
    metavar="M[:NAME=VALUE,...][,M]",
    help="Recover what is pruned here by methods of `edgemoe recover`, one after the other, on "
    "the lines that chose the experts; MODEL is the teacher.",
)
@click.option(
    "--keep",
    type=KeepType(),
    metavar="F|auto",
    help="Fraction of each layer's experts to keep, (0, 1]; auto finds the deepest cut within "
    "--max-drop. 0.75 without.",
)
@click.option(
    "--max-drop",
    type=float,
    metavar="D",
    help="Fail where a score gets worse by more, judged by the upper end of the drop's 95% "
    "interval: 0.05 is 5% of perplexity or 5 points of accuracy.",
)
@click.option(
    "--accept-weak-evidence",
    is_flag=True,
    help="Judge --max-drop although fewer than 20 lines do, or MODEL is not better than "
    "chance; the report says so.",
)
@click.option(
    "--accept-large-drop",
    is_flag=True,
    help="Take a --max-drop above 1 for perplexity: 2 is three times the perplexity.",
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
    "--speed/--no-speed",
    default=True,
    show_default=True,
    help="Time the bundle beside an unpruned one and beside MODEL, for target cpu.",
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
    recovered: tuple[str, ...],
    recover: tuple[str, ...],
    keep: Keep | None,
    max_drop: float | None,
    accept_weak_evidence: bool,
    accept_large_drop: bool,
    method: str,
    seed: int,
    calibration_tokens: int,
    held_out_tokens: int,
    ladder: bool,
    speed: bool,
    static_shapes: bool,
    memory_limit: float | None,
    force: bool,
    as_json: bool,
) -> None:
    """Write MODEL as a bundle that runs on a device.

    With --task it is calibrated, pruned, exported and evaluated in one go: three quarters of
    the examples are calibrated on, one quarter is held out and scores the result. Without
    --task the model is exported as it is. Statistics, scores and recovered checkpoints of an
    export that is refused or interrupted stay in OUTPUT.partial, and the next one uses them,
    with another --keep or --max-drop too. A checkpoint larger than memory is read layer by
    layer; the same command goes on from what is finished.
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
        recovered=split_task_arguments(recovered, of="from"),
        recover=recover,
        keep=keep,
        max_drop=max_drop,
        accept_weak_evidence=accept_weak_evidence,
        accept_large_drop=accept_large_drop,
        force=force,
        method=method,
        seed=seed,
        calibration_tokens=calibration_tokens,
        held_out_tokens=held_out_tokens,
        ladder=ladder,
        speed=speed,
        static_shapes=static_shapes,
        memory_limit_bytes=None if memory_limit is None else int(memory_limit * 1e9),
    )
    stages = StageLines(count_stages(request))
    exported = export_bundle(request, on_stage=stages.begin)
    stages.finish()
    report(exported.to_json(), describe_export(exported), as_json=as_json)
