"""The two jobs of a sweep, which run wherever there are workers: make a plan, judge a plan.

Each job leaves a file in the sweep's work directory and does nothing where the file is there
already. Plans that decide the same are judged once: a judgement's file is named after the
decision. A worker keeps the model, in memory whole, from one job to the next.
"""

from __future__ import annotations

import contextlib
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
from edgemoe.oracle.homes import MemoryHome, StreamedHome
from edgemoe.oracle.oracle import LayerOracle
from edgemoe.plans.plan import Plan
from edgemoe.prune.apply import applied, applied_layer
from edgemoe.prune.registry import find_method, make_plan
from edgemoe.resume import WorkDirectory
from edgemoe.spread.agreement import check_agreement
from edgemoe.spread.holding import hold
from edgemoe.staging import staged_file
from edgemoe.sweep.sizes import Sizes
from edgemoe.tasks import TaskFile

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from edgemoe.evaluate.scorer import Scorer
    from edgemoe.models.contract import MoeModel
    from edgemoe.oracle.homes import Home
    from edgemoe.sweep.cuts import Cut

STATISTICS = "statistics.safetensors"
HELD_OUT = "held-out"
_PLANS = "plans"
_SCORES = "scores"


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

    def prepare(self) -> None:
        """Make the folders that jobs write to."""
        for name in (_PLANS, _SCORES):
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
class Judgement:
    """What judging a plan found.

    Attributes:
        scores: Scores by task.
        sizes: Of the compressed model.
        seconds: What it took, opening the model not counted.
    """

    scores: Mapping[str, Evaluation]
    sizes: Sizes
    seconds: float


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
    home = _home(site) if find_method(cut.method).runs_layers else None
    began = time.perf_counter()
    plan = make_plan(
        statistics,
        cut.task,
        cut.method,
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
    began = time.perf_counter()
    with _compressed(site, job) as scorer:
        scores = {
            name: evaluate(
                scorer,
                TaskFile.load(name, site.work / HELD_OUT / f"{name}.jsonl"),
                tokenizer,
                max_tokens=site.held_out_tokens,
            )
            for name in site.tasks
        }
    seconds = time.perf_counter() - began
    judgement = Judgement(scores=scores, sizes=sizes, seconds=seconds)
    _leave(target, asdict(judgement))


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
    found = json.loads(site.score_file(decision).read_text(encoding="utf-8"))
    return Judgement(
        scores={name: _read_score(found["scores"][name]) for name in site.tasks},
        sizes=Sizes(**found["sizes"]),
        seconds=float(found["seconds"]),
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
