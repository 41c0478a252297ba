"""The jobs of a sweep, which run wherever there are workers: make, judge and recover plans.

Each job leaves a file in the sweep's work directory and does nothing where the file is there
already. Plans that decide the same are judged once: a judgement's file is named after the
decision. A worker keeps the model, in memory whole, from one job to the next.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from edgemoe.calibrate.statistics import Statistics
from edgemoe.evaluate.evaluation import Evaluation, evaluate
from edgemoe.evaluate.streamed_scorer import StreamedScorer
from edgemoe.evaluate.torch_scorer import TorchScorer
from edgemoe.models.checkpoint import load_model, load_tokenizer
from edgemoe.models.opening import open_streamed
from edgemoe.models.saving import save_model
from edgemoe.oracle.homes import MemoryHome, StreamedHome
from edgemoe.oracle.oracle import LayerOracle
from edgemoe.plans.plan import Plan
from edgemoe.prune.apply import applied, applied_layer, apply_plan
from edgemoe.prune.registry import make_plan, needs_model
from edgemoe.recover.recovery import recover_checkpoint
from edgemoe.resume import WorkDirectory
from edgemoe.spread.agreement import check_agreement
from edgemoe.spread.holding import hold, let_go
from edgemoe.staging import staged_directory, staged_file
from edgemoe.sweep.request import method_of
from edgemoe.sweep.sizes import Sizes
from edgemoe.tasks import TaskFile

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from tokenizers import Tokenizer

    from edgemoe.evaluate.scorer import Scorer
    from edgemoe.models.contract import MoeModel
    from edgemoe.oracle.homes import Home
    from edgemoe.recover.options import RecoverOptions
    from edgemoe.sweep.cuts import Cut

STATISTICS = "statistics.safetensors"
HELD_OUT = "held-out"
CALIBRATION = "calibration"
_PLANS = "plans"
_SCORES = "scores"
_RECOVERED = "recovered"


@dataclass(frozen=True, kw_only=True)
class Site:
    """What all jobs of a sweep share.

    Attributes:
        model: Checkpoint directory, absolute.
        work: The sweep's work directory, absolute; all workers see it.
        whole: Whether the model is loaded whole.
        tasks: The tasks, which judge in this order.
        held_out_tokens: Tokens of each to judge by.
        threads: CPU threads of a job; None leaves what the worker has.
        versions: What the worker must have too, or its bits may differ.
    """

    model: Path
    work: Path
    whole: bool
    tasks: tuple[str, ...]
    held_out_tokens: int
    threads: int | None
    versions: Mapping[str, str]

    def plan_file(self, cut: Cut) -> Path:
        """Say where a cut's plan is once it is made."""
        return self.work / _PLANS / f"{cut.key}.json"

    def score_file(self, decision: str) -> Path:
        """Say where a decision's judgement is once it is made."""
        return self.work / _SCORES / f"{decision}.json"

    def recovered_file(self, job: RecoverJob) -> Path:
        """Say where the judgement of a recovered decision is once it is made."""
        return self.work / _RECOVERED / f"{job.key}.json"

    def prepare(self) -> None:
        """Make the folders that jobs write to."""
        for name in (_PLANS, _SCORES, _RECOVERED):
            (self.work / name).mkdir(exist_ok=True)


@dataclass(frozen=True, kw_only=True)
class PlanJob:
    """Make a plan."""

    site: Site
    cut: Cut


@dataclass(frozen=True, kw_only=True)
class JudgeJob:
    """Judge a plan on every task."""

    site: Site
    plan: Plan
    decision: str


@dataclass(frozen=True, kw_only=True)
class RecoverJob:
    """Carry out a plan, recover what it makes on the task's calibration lines, and judge it.

    The plan itself must have been judged.
    """

    site: Site
    plan: Plan
    decision: str
    task: str
    method: str
    options: RecoverOptions

    @property
    def key(self) -> str:
        """Name of its judgement among finished work, which may be of several sweeps."""
        content = json.dumps(asdict(self.options), sort_keys=True)
        digest = hashlib.sha256(content.encode()).hexdigest()[:12]
        return f"{self.decision}-{self.task}-{self.method}-{digest}"


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What judging a plan found.

    Attributes:
        scores: Scores by task.
        sizes: Of the compressed model.
        seconds: What it took, opening the model not counted.
        recover_seconds: What the recovery before it took; after an interruption, the rest.
    """

    scores: Mapping[str, Evaluation]
    sizes: Sizes
    seconds: float
    recover_seconds: float = 0.0


def run_plan_job(job: PlanJob) -> None:
    """Make a plan and leave it in the work directory.

    Args:
        job: Which.

    Raises:
        SpreadError: This machine does not see the files, or has other versions.
        PlanError: The method refuses what is asked of it.
        StreamingError: The method cannot run this model's layers.
    """
    site, cut = job.site, job.cut
    target = site.plan_file(cut)
    if target.exists():
        return
    _begin(site)
    file = site.work / STATISTICS
    statistics = hold("statistics", file, lambda: Statistics.load(file))
    method = method_of(cut.method)
    home = _home(site) if needs_model(method, cut.options) else None
    began = time.perf_counter()
    plan = make_plan(
        statistics,
        cut.task,
        method,
        cut.counts,
        seed=cut.seed,
        options=cut.options,
        open_oracle=None if home is None else lambda windows: LayerOracle(home, windows),
    )
    _leave(target, {"seconds": time.perf_counter() - began, "plan": plan.to_json()})


def run_judge_job(job: JudgeJob) -> None:
    """Judge a plan on every task and leave the judgement in the work directory.

    Args:
        job: Which.

    Raises:
        SpreadError: This machine does not see the files, or has other versions.
        TaskFileError: A line cannot be scored.
        CheckpointError: The compressed model answers NaN or infinity.
    """
    site = job.site
    target = site.score_file(job.decision)
    if target.exists():
        return
    _begin(site)
    tokenizer = load_tokenizer(site.model)
    model = _model(site) if site.whole else open_streamed(site.model).moe
    sizes = Sizes.of(model, job.plan.experts_per_layer, job.plan.widths(model.shape))
    with _compressed(site, job) as scorer:
        scores, seconds = _score(site, scorer, tokenizer)
    judgement = Judgement(scores=scores, sizes=sizes, seconds=seconds)
    _leave(target, asdict(judgement))


def run_recover_job(job: RecoverJob) -> None:
    """Recover what a plan makes of the model, judge it, and leave the judgement.

    The checkpoints on the way go when they are judged: the report has what makes them again.

    Args:
        job: Which.

    Raises:
        SpreadError: This machine does not see the files, or has other versions.
        RecoveryError: The recovery refuses, or memory is too small.
        TaskFileError: The task has too few lines to train on, or one that cannot be scored.
        CheckpointError: The recovered model answers NaN or infinity.
    """
    site = job.site
    target = site.recovered_file(job)
    if target.exists():
        return
    _begin(site)
    # A recovery holds two models of its own.
    let_go()
    folder = site.work / _RECOVERED / job.key
    folder.mkdir(exist_ok=True)
    compressed, recovered = folder / "compressed", folder / "checkpoint"
    began = time.perf_counter()
    if not compressed.exists():
        with staged_directory(compressed) as staged:
            save_model(apply_plan(load_model(site.model), job.plan), staged, source=site.model)
    if not recovered.exists():
        lines = TaskFile.load(job.task, site.work / CALIBRATION / f"{job.task}.jsonl")
        recover_checkpoint(
            compressed,
            [lines],
            recovered,
            method=job.method,
            teacher=site.model,
            options=job.options,
        )
    recover_seconds = time.perf_counter() - began
    scorer = TorchScorer(load_model(recovered))
    scores, seconds = _score(site, scorer, load_tokenizer(recovered))
    judgement = Judgement(
        scores=scores,
        sizes=read_judgement(site, job.decision).sizes,
        seconds=seconds,
        recover_seconds=recover_seconds,
    )
    _leave(target, asdict(judgement))
    shutil.rmtree(folder)


def read_plan(site: Site, cut: Cut) -> tuple[Plan, float]:
    """Read what a finished job made.

    Args:
        site: The sweep.
        cut: Which.

    Returns:
        The plan, and the seconds that it took.
    """
    found = json.loads(site.plan_file(cut).read_text(encoding="utf-8"))
    return Plan.from_json(found["plan"], str(site.plan_file(cut))), float(found["seconds"])


def read_judgement(site: Site, decision: str) -> Judgement:
    """Read what a finished job found.

    Args:
        site: The sweep.
        decision: Which.

    Returns:
        The judgement.
    """
    return _read_judgement(site, site.score_file(decision))


def read_recovered(job: RecoverJob) -> Judgement:
    """Read what a finished recovery came to.

    Args:
        job: Which.

    Returns:
        The judgement.
    """
    return _read_judgement(job.site, job.site.recovered_file(job))


def _read_judgement(site: Site, file: Path) -> Judgement:
    found = json.loads(file.read_text(encoding="utf-8"))
    return Judgement(
        scores={name: _read_score(found["scores"][name]) for name in site.tasks},
        sizes=Sizes(**found["sizes"]),
        seconds=float(found["seconds"]),
        recover_seconds=float(found["recover_seconds"]),
    )


def _read_score(found: dict[str, Any]) -> Evaluation:
    lists = ("ci95", "line_losses", "line_tokens", "line_hits")
    return Evaluation(**{**found, **{name: tuple(found[name]) for name in lists}})


def _begin(site: Site) -> None:
    import torch

    check_agreement({"checkpoint": site.model, "work directory": site.work}, site.versions)
    if site.threads is not None:
        torch.set_num_threads(site.threads)


def _model(site: Site) -> MoeModel:
    return hold("model", site.model, lambda: load_model(site.model))


def _home(site: Site) -> Home:
    if site.whole:
        return MemoryHome(_model(site))
    return hold("home", site.model, lambda: StreamedHome(open_streamed(site.model)))


def _score(
    site: Site, scorer: Scorer, tokenizer: Tokenizer
) -> tuple[dict[str, Evaluation], float]:
    """Judge on every task; return the scores and the seconds that they took."""
    began = time.perf_counter()
    scores = {
        name: evaluate(
            scorer,
            TaskFile.load(name, site.work / HELD_OUT / f"{name}.jsonl"),
            tokenizer,
            max_tokens=site.held_out_tokens,
        )
        for name in site.tasks
    }
    return scores, time.perf_counter() - began


@contextlib.contextmanager
def _compressed(site: Site, job: JudgeJob) -> Iterator[Scorer]:
    """Yield a scorer of what the plan makes of the model."""
    if site.whole:
        model = _model(site)
        with applied(model, job.plan):
            yield TorchScorer(model)
        return
    streamed = open_streamed(site.model)
    job.plan.validate(streamed.moe.shape)
    plans = {plan.layer: plan for plan in job.plan.layers}
    layers = {layer.index: layer for layer in streamed.moe.layers}

    def change(index: int) -> contextlib.AbstractContextManager[None]:
        if index not in layers:
            return contextlib.nullcontext()
        return applied_layer(layers[index], plans[index])

    outputs = WorkDirectory(site.work).empty_directory(f"outputs-{job.decision}")
    yield StreamedScorer(streamed, WorkDirectory(outputs), inside=change)
    shutil.rmtree(outputs)


def _leave(target: Path, content: Mapping[str, Any]) -> None:
    """Write a finished job's file, whole or not at all."""
    with staged_file(target, force=True) as staged:
        staged.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
