"""Decide which experts a task keeps."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from edgemoe.api.arguments import (
    as_path,
    check_at_least_one,
    check_measured,
    files_of,
    option_texts,
    read_statistics,
)
from edgemoe.api.checks import check_checkpoint, check_fraction, check_output, check_seed
from edgemoe.api.extras import needs
from edgemoe.api.method_names import PRUNING, check_name, check_options
from edgemoe.api.running import running
from edgemoe.api.workers import choose_executor, extras_of
from edgemoe.errors import ArgumentError
from edgemoe.staging import reserved

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from edgemoe.api.arguments import Options, StrPath
    from edgemoe.calibrate.statistics import Statistics
    from edgemoe.layerwise.provider import LayerProvider
    from edgemoe.models.checkpoint import Checkpoint
    from edgemoe.models.shapes import ModelShape
    from edgemoe.oracle.remote import WorkerPool
    from edgemoe.parallel.workers import ExecutorConfig
    from edgemoe.plans.plan import Plan
    from edgemoe.progress import OnProgress


def prune(
    model: StrPath,
    statistics: Statistics | StrPath,
    task: str | Mapping[str, float],
    method: str,
    output: StrPath | None = None,
    *,
    keep: float | None = None,
    keep_experts: int | Sequence[int] | None = None,
    layers: Literal["uniform", "owl"] = "uniform",
    seed: int = 0,
    options: Options = (),
    workers: int | None = None,
    ray: str | None = None,
    threads: int | None = None,
    force: bool = False,
    on_progress: OnProgress | None = None,
) -> Plan:
    """Decide which experts, or which of their intermediate channels, a task keeps.

    A plan is a decision: no weight is moved until `edgemoe.apply_plan`. Most methods read
    the statistics alone; `camera`, `heapr`, `moe-i2`, `naee` and `ream` also run the model's
    layers on the tokens that are kept there, as `layers="owl"` does. With `output` the plan is
    written as JSON; without it nothing is.

    Sources: `reap` https://arxiv.org/abs/2510.13999, `naee` https://arxiv.org/abs/2402.14800,
    OWL https://arxiv.org/abs/2310.05175; each file of `edgemoe.prune` names that of its
    method.

    Args:
        model: Checkpoint directory.
        statistics: Statistics of that checkpoint, or their file.
        task: A task of the statistics, or several with their weights, each in (0, inf), of
            which only ratios count.
        method: One of `edgemoe.prune.registry.METHODS`.
        output: Plan file to write; None writes none.
        keep: Fraction of each layer's experts to keep, in (0, 1], rounded to the nearest
            number, in whole router groups; of the intermediate channels of all experts with
            `camera` and `heapr`. Exactly one of `keep` and `keep_experts` must be given.
        keep_experts: Experts to keep in each MoE layer, in [top_k, experts of the layer]: one
            number, or one for each layer.
        layers: `owl` keeps as many experts in all, but more of them in layers whose weights
            have more outliers on the task.
        seed: Seed of methods that draw, in [0, inf).
        options: Options of the method by name, such as `{"population": 50}` for `moe-i2`.
        workers: `moe-i2` and `naee` search so many layers at once, in [1, inf), on processes of
            this machine or on the Ray cluster; each loads the model.
        ray: As in `edgemoe.calibrate`, for `moe-i2` and `naee`.
        threads: CPU threads of each process, in [1, inf); None leaves what they are.
        force: Whether `output` may be replaced.
        on_progress: Called with each `edgemoe.progress.ProgressEvent`; None draws a bar
            where stderr is a terminal.

    Returns:
        The plan, checked against the checkpoint; the same arguments give the same plan.

    Raises:
        ArgumentError: Both or none of `keep` and `keep_experts` are given, or `workers` or
            `ray` with a method that decides in one process.
        PlanError: The method, a count, an option or the seed is out of range, or the checkpoint
            cannot be pruned any more.
        StatisticsError: The statistics are of another checkpoint, or not of the task.
        CheckpointError: The checkpoint is missing, unsafe or inconsistent.
        FamilyError: The family is not supported.
        StreamingError: The method cannot run this model's layers.
        SpreadError: There is no room for so many workers, or they die.
        OutputError: `output` exists and `force` is false, or cannot be written.
        MissingDependencyError: The extra `export`, or `ray`, is not installed.

    Example:
        >>> from edgemoe import prune
        >>> plan = prune("moe", "code.stats", "code", "reap", "code.plan.json", keep=0.5)
        >>> counts = plan.experts_per_layer
    """
    if (keep is None) == (keep_experts is None):
        raise ArgumentError("give exactly one of --keep and --keep-experts.")
    check_at_least_one(workers=workers, threads=threads)
    path, target = Path(model), as_path(output)
    extras = ("export", *extras_of(ray))
    needs(*extras)
    check_name(method, PRUNING)
    texts = [*_layers_option(layers, keep_experts), *option_texts(options)]
    check_options(method, PRUNING, texts)
    check_seed(seed)
    kept = "neurons" if method in ("camera", "heapr") else "experts"
    check_fraction("--keep", f"a fraction of the {kept}", keep)
    check_output(target, path, *files_of(statistics), force=force, directory=False)
    check_checkpoint(path)
    measured = read_statistics(statistics)
    for name in [task] if isinstance(task, str) else task:
        measured.task(name)
    with (
        running(*extras, threads=threads, on_progress=on_progress),
        reserved(target, force=force, directory=False),
    ):
        from edgemoe.apply.checks import refuse_changes
        from edgemoe.models.checkpoint import Checkpoint
        from edgemoe.oracle.oracle import LayerOracle
        from edgemoe.prune.registry import find_method, make_plan, read_options

        asked = keep_experts
        weights = task if isinstance(task, str) else {n: float(w) for n, w in task.items()}
        chosen = read_options(method, texts)
        spread = workers is not None or ray is not None
        if spread and not find_method(method).parallel:
            raise ArgumentError(
                f"--workers and --ray cannot be used with {method}, which decides in one "
                "process."
            )
        checkpoint = Checkpoint(path)
        structure = checkpoint.structure
        refuse_changes(structure)
        counts = _counts(method, structure.shape, keep, asked)
        check_measured(measured, statistics, path, checkpoint.sha256, "pruned")
        with contextlib.ExitStack() as stack:
            executor = choose_executor(workers, ray)
            pool = stack.enter_context(_open_pool(executor, path, threads)) if spread else None
            plan = make_plan(
                measured,
                weights,
                method,
                counts,
                seed=seed,
                options=chosen,
                open_oracle=lambda windows: LayerOracle(_open(checkpoint, pool), windows, pool),
            )
        if target is not None:
            plan.save(target, force=force)
    return plan


def _layers_option(layers: str, asked: int | Sequence[int] | None) -> list[str]:
    """Turn `layers` into an option of the method."""
    if layers == "uniform":
        return []
    if asked is not None and not isinstance(asked, int):
        raise ArgumentError(
            f"--layers {layers} decides how many experts each layer keeps: give --keep, or one "
            "number to --keep-experts."
        )
    return [f"layers={layers}"]


def _counts(
    method: str, shape: ModelShape, keep: float | None, asked: int | Sequence[int] | None
) -> tuple[int, ...]:
    """Return what each MoE layer keeps: experts, or intermediate channels of each."""
    from edgemoe.errors import PlanError
    from edgemoe.prune.keep import count_kept
    from edgemoe.prune.registry import count_for, find_method

    if keep is not None:
        return count_for(method, shape, keep)
    if find_method(method).prunes_width:
        shown = asked if isinstance(asked, int) else ",".join(map(str, asked or ()))
        raise PlanError(
            f"{method} must be told a fraction of the neurons, since it keeps all experts, got "
            f"--keep-experts {shown}. Use --keep."
        )
    return count_kept(shape, keep_experts=asked)


def _open(model: Checkpoint, pool: WorkerPool | None) -> LayerProvider:
    """Open the model for a method that runs its layers."""
    from edgemoe.layerwise.provider import StreamedLayers, open_layers
    from edgemoe.models.opening import open_streamed

    # Where workers have the model, this process needs none of it in memory.
    return open_layers(model) if pool is None else StreamedLayers(open_streamed(model))


@contextlib.contextmanager
def _open_pool(
    executor: ExecutorConfig, model: Path, threads: int | None
) -> Iterator[WorkerPool]:
    from edgemoe.oracle.remote import WorkerPool
    from edgemoe.parallel.agreement import threads_of
    from edgemoe.parallel.opening import open_workers
    from edgemoe.parallel.workers import Processes, RayCluster
    from edgemoe.sweep.memory_check import fits_whole

    # Refused before workers are there for nothing, where that is known.
    fits_whole(model, executor.count if isinstance(executor, Processes) else 1)
    with open_workers(executor) as workers:
        is_here = not isinstance(executor, RayCluster) or executor.address == "local"
        yield WorkerPool(
            workers=workers,
            model=model.resolve(),
            whole=fits_whole(model, workers.count if is_here else 1),
            threads=threads_of(executor, threads),
        )
