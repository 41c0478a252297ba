"""Prune further and further, and find the smallest model that holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgemoe.api.arguments import check_at_least_one, option_texts, read_tasks, task_paths
from edgemoe.api.checks import check_checkpoint, check_output
from edgemoe.api.extras import needs
from edgemoe.api.method_names import PRUNING, RECOVERY, check_name, check_options
from edgemoe.api.running import running
from edgemoe.api.workers import choose_executor, extras_of
from edgemoe.staging import reserved
from edgemoe.sweep.request import SweepRequest, split_names, split_option

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgemoe.api.arguments import Options, StrPath, Tasks
    from edgemoe.progress import OnProgress
    from edgemoe.recover.options import RecoverOptions
    from edgemoe.sweep.outcome import Outcome


def sweep(
    model: StrPath,
    tasks: Tasks,
    methods: Sequence[str],
    output: StrPath,
    *,
    held_out: Tasks = (),
    options: Mapping[str, Options] | Sequence[str] = (),
    recoveries: Mapping[str, RecoverOptions] | Sequence[str] = (),
    keeps: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
    layers: Sequence[str] = ("uniform",),
    seeds: Sequence[int] = (0,),
    max_drop: float = 0.02,
    accept_weak_evidence: bool = False,
    accept_large_drop: bool = False,
    calibration_tokens: int = 16384,
    held_out_tokens: int = 8192,
    workers: int | None = None,
    ray: str | None = None,
    threads: int | None = None,
    memory_limit_gb: float | None = None,
    force: bool = False,
    on_progress: OnProgress | None = None,
) -> Outcome:
    """Score a checkpoint with fewer and fewer experts, and find the smallest that holds.

    Every method makes a plan for every task at every fraction, and each is scored on examples
    that no calibration read. A report directory is written: `report.json`, `report.md`,
    `sweep.csv`, `sweep.png`, the plans, the statistics and the held-out examples.
    `<output>.partial` keeps what is finished, and after an interruption the same call goes on.

    Sources: those of the methods, as in `edgemoe.prune`; the interval of a drop is a
    paired bootstrap over examples (https://arxiv.org/abs/1411.5279).

    Args:
        model: Checkpoint directory.
        tasks: Task files by name, or tasks that are loaded and whose files are still there.
            Three quarters of the examples choose the experts, every fourth judges.
        methods: Methods of `edgemoe.prune`, each once.
        output: Report directory to write.
        held_out: Files that judge tasks, by name: all examples of `tasks` choose then.
        options: Options of methods, by method and name; or `METHOD:NAME=VALUE` texts.
        recoveries: Score every plan once more after a method of `edgemoe.recover` on the
            examples that chose its experts: options by method, or `METHOD:NAME=VALUE,...`.
        keeps: Fractions of each layer's experts to keep, each in (0, 1]; those below what a
            token uses are left out.
        layers: `uniform`, `owl` or both, as in `edgemoe.prune`.
        seeds: Seeds of the methods that draw, each in [0, inf).
        max_drop: Largest drop at the threshold: 0.05 is 5% of perplexity or 5 points of
            accuracy; the upper end of the drop's 95% interval may be so much. In [0, 1]; for
            perplexity in [0, inf) with `accept_large_drop`.
        accept_weak_evidence: Whether fewer than 20 lines may judge, and a model be swept that
            is not better than chance on a task; the report says so.
        accept_large_drop: Whether `max_drop` may let a perplexity more than double.
        calibration_tokens: Tokens of each task to choose experts by, in [1, inf).
        held_out_tokens: Tokens of each task to judge by, in [2, inf).
        workers: Run so many jobs at once, in [1, inf), on processes of this machine or on the
            Ray cluster; each loads the model.
        ray: As in `edgemoe.calibrate`.
        threads: CPU threads of each process, in [1, inf); None leaves what they are.
        memory_limit_gb: Size in float32 (10^9 bytes) of the models that may be loaded whole, of
            all processes together, in [0, inf); a larger one is read layer by layer. None takes
            half of what is free.
        force: Whether `output`, and unfinished work of another sweep, may be replaced.
        on_progress: Called with each `edgemoe.progress.ProgressEvent`; None draws a bar
            where stderr is a terminal.

    Returns:
        Every plan with its scores; `.thresholds` has the smallest model of each task whose drop
        is, with 95% confidence, at most `max_drop`.

    Raises:
        ArgumentError: `workers` or `threads` is out of range.
        SweepError: A value is out of range, or something is given twice or not at all.
        TaskFileError: A task file breaks the format or is too short.
        PlanError: There is no such method or option, or a method refuses.
        RecoveryError: A recovery or its option is out of range.
        CheckpointError: The checkpoint is missing, unsafe or inconsistent.
        FamilyError: The family is not supported.
        StreamingError: A method cannot run this model's layers.
        SpreadError: There is no room for so many workers, there are none, or they die.
        OutputError: `output` exists and `force` is false, or the disk refuses.
        MissingDependencyError: The extra `export`, `sweep` or `ray` is not installed.

    Example:
        >>> from edgemoe import sweep
        >>> few = {"keeps": [0.5], "accept_weak_evidence": True}  # of seven held-out lines
        >>> outcome = sweep("moe", {"code": "code.jsonl"}, ["reap"], "report", **few)
        >>> smallest = outcome.thresholds["code"].best
    """
    check_at_least_one(workers=workers, threads=threads)
    path, target, extras = Path(model), Path(output), ("export", "sweep", *extras_of(ray))
    needs(*extras)
    names = split_names(methods)
    for name in names:
        check_name(name, PRUNING)
    for text in _texts(options):
        name, option = split_option(text, names)
        check_options(name, PRUNING, [option])
    given = recoveries if isinstance(recoveries, Mapping) else list(recoveries)
    for recovery in given:
        check_name(recovery.partition(":")[0], RECOVERY)
    request = SweepRequest(
        model=path,
        output=target,
        tasks=task_paths(tasks),
        methods={name: {} for name in names},  # their options are read with the methods
        held_out=task_paths(held_out),
        keeps=[float(keep) for keep in keeps],
        seeds=seeds,
        max_drop=float(max_drop),
        accept_weak_evidence=accept_weak_evidence,
        accept_large_drop=accept_large_drop,
        calibration_tokens=calibration_tokens,
        held_out_tokens=held_out_tokens,
        threads=threads,
        memory_limit_bytes=None if memory_limit_gb is None else int(memory_limit_gb * 1e9),
        force=force,
    )
    request.check_values()
    inputs = (path, *task_paths(tasks).values(), *task_paths(held_out).values())
    check_output(target, *inputs, force=force, directory=True)
    check_checkpoint(path)
    for some in (tasks, held_out):
        if some:
            read_tasks(some, path)  # read again where they are used: here for what is wrong
    with (
        running(*extras, on_progress=on_progress),
        reserved(target, force=force, directory=True, resumes=True),
    ):
        from edgemoe.sweep.methods import read_methods
        from edgemoe.sweep.recoveries import read_recoveries
        from edgemoe.sweep.sweep import run_sweep

        request = replace(
            request,
            methods=read_methods(methods, _texts(options), layers),
            recoveries=recoveries
            if isinstance(recoveries, Mapping)
            else read_recoveries(recoveries),
        )
        return run_sweep(request, choose_executor(workers, ray))


def _texts(options: Mapping[str, Options] | Sequence[str]) -> list[str]:
    if not isinstance(options, Mapping):
        return list(options)
    return [
        f"{method}:{text}" for method, given in options.items() for text in option_texts(given)
    ]
