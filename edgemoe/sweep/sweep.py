"""Run a sweep: measure, make every plan, judge every decision, report."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from edgemoe.apply.checks import refuse_changes
from edgemoe.calibrate.collect import collect
from edgemoe.calibrate.shards import calibrate_in_shards
from edgemoe.calibrate.statistics import Statistics
from edgemoe.errors import StreamingError, SweepError
from edgemoe.evaluate.contamination import examples_seen
from edgemoe.evaluate.gate import ACCEPT_WEAK, find_weaknesses
from edgemoe.models.checkpoint import Checkpoint, load_model
from edgemoe.parallel.agreement import threads_of
from edgemoe.parallel.opening import open_workers
from edgemoe.parallel.workers import Processes, RayCluster
from edgemoe.plans.keep_all import keep_all
from edgemoe.resume import publish, resumable, resume_key
from edgemoe.staging import staged_file, sync
from edgemoe.sweep.candidates import Candidate, hash_decision, list_candidates
from edgemoe.sweep.evaluation import CandidateEvaluation
from edgemoe.sweep.jobs import JudgeJob, PlanJob, read_plan, run_judge_job, run_plan_job
from edgemoe.sweep.memory_check import fits_whole
from edgemoe.sweep.outcome import Finding, Outcome
from edgemoe.sweep.recover_job import RecoverJob, run_recover_job
from edgemoe.sweep.report import write_report
from edgemoe.sweep.sweep_dir import CALIBRATION, HELD_OUT, STATISTICS, SweepDir
from edgemoe.sweep.task_examples import check_judging, load_lines, write_lines
from edgemoe.tasks import TaskFile
from edgemoe.versions import library_versions

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edgemoe.models.shapes import ModelShape
    from edgemoe.parallel.workers import ExecutorConfig, Workers
    from edgemoe.plans.plan import Plan
    from edgemoe.recover.options import RecoverOptions
    from edgemoe.resume import WorkDirectory
    from edgemoe.sweep.request import SweepRequest
    from edgemoe.sweep.task_examples import TaskLines

_BEGUN = f"{STATISTICS}*"
_REPORT = "report"


def run_sweep(request: SweepRequest, executor: ExecutorConfig) -> Outcome:
    """Run a sweep and write its report.

    Finished statistics, plans and judgements are kept in `<output>.partial` until the report
    is written; a sweep of the same model and lines goes on from there, with the same methods
    and fractions or with others.

    Args:
        request: What to sweep over.
        executor: Where the jobs run. All workers must see the checkpoint and the directory that
            the report is written to.

    Returns:
        What was found. The same request gives the same, bit for bit, on the same kind of
        machine, wherever the jobs run and however often the sweep was interrupted.

    Raises:
        SweepError: The request cannot be met.
        TaskFileError: A task file is malformed or too short.
        PlanError: There is no such method, or a method refuses.
        CheckpointError: The checkpoint is missing, unsafe or inconsistent.
        FamilyError: The family is not supported.
        SpreadError: There is no room for so many workers, there are none, or they die.
        StreamingError: A method cannot run this model's layers.
        OutputError: The output exists, or the disk refuses.
    """
    request.check()
    checkpoint = Checkpoint(request.model)
    structure = checkpoint.structure
    refuse_changes(structure)
    shape = structure.shape
    candidates, impossible = list_candidates(request, shape)
    seen = examples_seen(request.model, "", checkpoint.read)
    lines = load_lines(request.tasks, request.held_out, seen, checkpoint)
    request.check_limit(*(task.held_out.kind for task in lines.values()))
    check_judging(
        lines,
        checkpoint.tokenizer,
        max_length=checkpoint.max_length,
        max_tokens=request.held_out_tokens,
        accept_few=request.accept_weak_evidence,
    )
    vocabulary = int(checkpoint.config.vocab_size)
    output = request.output.resolve()
    threads = threads_of(executor, request.threads)
    key = resume_key(
        "sweep",
        checkpoint,
        tasks={name: [task.calibration, task.held_out] for name, task in lines.items()},
        options=[request.calibration_tokens, request.held_out_tokens, threads],
        tokenizer=checkpoint.tokenizer_sha256,
    )
    # Refused before workers are there for nothing, where that is known.
    workers_here = executor.count if isinstance(executor, Processes) else 1
    fits_whole(request.model, workers_here, request.memory_limit_bytes)
    with open_workers(executor) as workers:
        if isinstance(executor, RayCluster) and executor.address == "local":
            workers_here = workers.count
        whole = fits_whole(request.model, workers_here, request.memory_limit_bytes)
        if request.recoveries and not whole:
            raise SweepError(
                "--recover must have a model that fits into memory twice, got one that has to "
                "be read layer by layer. Leave it out, or raise --memory-limit."
            )
        with resumable(output, key, _BEGUN, force=request.force) as work:
            sweep_dir = SweepDir(
                model=request.model.resolve(),
                work=work.path,
                whole=whole,
                tasks=tuple(lines),
                held_out_tokens=request.held_out_tokens,
                threads=threads,
                versions=library_versions(),
            )
            statistics = _measure(request, checkpoint, lines, workers, work, threads)
            held_out = _prepare(sweep_dir, lines)
            unpruned = _judge_unpruned(sweep_dir, workers, shape)
            if not request.accept_weak_evidence:
                _refuse_weak_evidence(unpruned[1], vocabulary)
            findings = _judge(sweep_dir, workers, candidates, unpruned)
            findings = _recover(sweep_dir, workers, findings, request.recoveries)
            outcome = Outcome(
                request=request,
                statistics=statistics,
                lines=lines,
                held_out=held_out,
                findings=tuple(findings),
                unpruned=unpruned[1],
                impossible=tuple(impossible),
                whole=whole,
                vocabulary=vocabulary,
            )
            folder = work.empty_directory(_REPORT)
            write_report(outcome, folder, sweep_dir.work)
            for path in folder.rglob("*"):
                sync(path)
            publish(folder, output, force=request.force)
    return outcome


def _measure(
    request: SweepRequest,
    checkpoint: Checkpoint,
    lines: Mapping[str, TaskLines],
    workers: Workers,
    work: WorkDirectory,
    threads: int | None,
) -> Statistics:
    """Measure the tasks, or read what an interrupted sweep measured."""
    file = work.path / STATISTICS
    if file.exists():
        return Statistics.load(file)
    tasks = [task.calibration for task in lines.values()]
    try:
        return calibrate_in_shards(
            request.model,
            tasks,
            file,
            workers,
            max_tokens=request.calibration_tokens,
            threads=threads,
            # An interrupted sweep may go on with another number of workers, and so of shards.
            force=True,
        )
    except StreamingError:
        # Its layers cannot be told apart, so it is loaded whole.
        statistics = collect(
            load_model(checkpoint),
            tasks,
            checkpoint.tokenizer,
            max_tokens=request.calibration_tokens,
        )
        statistics.save(file)
        return statistics


def _prepare(sweep_dir: SweepDir, lines: Mapping[str, TaskLines]) -> dict[str, TaskFile]:
    """Write all lines where workers find them; return those that are held out."""
    sweep_dir.prepare()
    held_out = {}
    for name, task in lines.items():
        for kind, some in ((CALIBRATION, task.calibration), (HELD_OUT, task.held_out)):
            file = sweep_dir.lines_file(kind, name)
            file.parent.mkdir(exist_ok=True)
            if not file.exists():
                with staged_file(file) as staged:
                    write_lines(some, staged)
        held_out[name] = TaskFile.load(name, file)
    return held_out


def _judge_unpruned(
    sweep_dir: SweepDir, workers: Workers, shape: ModelShape
) -> tuple[str, CandidateEvaluation]:
    """Judge the model as it is, before any plan is made."""
    whole = keep_all(shape)
    decision = hash_decision(whole)
    file = sweep_dir.score_file(decision)
    if not file.exists():
        job = JudgeJob(sweep_dir=sweep_dir, plan=whole, decision=decision)
        workers.map(run_judge_job, [job], "judge the model")
    return decision, CandidateEvaluation.load(file, sweep_dir.tasks)


def _refuse_weak_evidence(unpruned: CandidateEvaluation, vocabulary: int) -> None:
    """Refuse tasks on which the model is not better than chance."""
    for name, score in unpruned.scores.items():
        for weakness in find_weaknesses(score, vocabulary):
            raise SweepError(
                f"--max-drop must be judged by evidence, got task {name}: {weakness}. Give "
                f"lines that the model does better on, or {ACCEPT_WEAK} to go on: the report "
                "says so then, and what was measured is kept."
            )


def _judge(
    sweep_dir: SweepDir,
    workers: Workers,
    candidates: Sequence[Candidate],
    unpruned: tuple[str, CandidateEvaluation],
) -> list[Finding]:
    """Make every plan, then judge every decision once."""
    jobs = [
        PlanJob(sweep_dir=sweep_dir, candidate=candidate)
        for candidate in candidates
        if not sweep_dir.plan_file(candidate).exists()
    ]
    workers.map(run_plan_job, jobs, "make plans")
    made = [(candidate, *read_plan(sweep_dir, candidate)) for candidate in candidates]
    decisions: dict[str, Plan] = {}
    for _, plan, _ in made:
        decisions.setdefault(hash_decision(plan), plan)
    judging = [
        JudgeJob(sweep_dir=sweep_dir, plan=plan, decision=decision)
        for decision, plan in decisions.items()
        if not sweep_dir.score_file(decision).exists()
    ]
    workers.map(run_judge_job, judging, "judge plans")
    judged = {
        decision: CandidateEvaluation.load(sweep_dir.score_file(decision), sweep_dir.tasks)
        for decision in decisions
    }
    # What decided to keep all is the model as it is.
    judged.update([unpruned])
    return [
        Finding(
            candidate=candidate,
            plan=plan,
            plan_seconds=seconds,
            judgement=judged[hash_decision(plan)],
        )
        for candidate, plan, seconds in made
    ]


def _recover(
    sweep_dir: SweepDir,
    workers: Workers,
    findings: Sequence[Finding],
    recoveries: Mapping[str, RecoverOptions],
) -> list[Finding]:
    """Recover every decision for its task once; return each finding with its recoveries."""
    jobs = {
        (hash_decision(found.plan), found.candidate.task, method): RecoverJob(
            sweep_dir=sweep_dir,
            plan=found.plan,
            decision=hash_decision(found.plan),
            task=found.candidate.task,
            method=method,
            options=options,
        )
        for found in findings
        for method, options in recoveries.items()
    }
    left = [job for job in jobs.values() if not sweep_dir.recovered_file(job.key).exists()]
    workers.map(run_recover_job, left, "recover and judge")
    judged = {
        key: CandidateEvaluation.load(sweep_dir.recovered_file(job.key), sweep_dir.tasks)
        for key, job in jobs.items()
    }
    return [
        one
        for found in findings
        for one in (
            found,
            *(
                replace(
                    found,
                    recovery=method,
                    judgement=judged[hash_decision(found.plan), found.candidate.task, method],
                )
                for method in recoveries
            ),
        )
    ]
