"""Two jobs of a sweep, which run wherever there are workers: make a plan, judge a plan.

Each job leaves a file in the sweep's work directory and does nothing where the file is there
already. Plans that decide the same are judged once: a judgement's file is named after the
decision. A worker keeps the model, in memory whole, from one job to the next.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgemoe.apply.expert_tensors import applied_layer
from edgemoe.apply.in_memory import applied
from edgemoe.calibrate.statistics import Statistics
from edgemoe.evaluate.torch_scorer import TorchScorer
from edgemoe.layerwise.provider import InMemoryLayers, StreamedLayers
from edgemoe.models.checkpoint import load_model, load_tokenizer
from edgemoe.models.opening import open_streamed
from edgemoe.oracle.oracle import LayerOracle
from edgemoe.parallel.worker_cache import get_or_create
from edgemoe.plans.plan import Plan
from edgemoe.prune.registry import make_plan, needs_model
from edgemoe.resume import WorkDirectory
from edgemoe.sweep.evaluation import CandidateEvaluation, judge
from edgemoe.sweep.methods import method_of
from edgemoe.sweep.sizes import Sizes
from edgemoe.sweep.sweep_dir import STATISTICS, leave
from edgemoe_runtime.input_files import parse_strict, read_file

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from edgemoe.calibrate.sample import Window
    from edgemoe.evaluate.scorer import Scorer
    from edgemoe.layerwise.provider import LayerProvider
    from edgemoe.models.contract import MoeModel
    from edgemoe.sweep.candidates import Candidate
    from edgemoe.sweep.sweep_dir import SweepDir


@dataclass(frozen=True, kw_only=True)
class PlanJob:
    """Make a plan."""

    sweep_dir: SweepDir
    candidate: Candidate


@dataclass(frozen=True, kw_only=True)
class JudgeJob:
    """Judge a plan on every task."""

    sweep_dir: SweepDir
    plan: Plan
    decision: str


def run_plan_job(job: PlanJob) -> None:
    """Make a plan and leave it in the work directory.

    Args:
        job: Which.

    Raises:
        SpreadError: This machine does not see the files, or has other versions.
        PlanError: The method refuses what is asked of it.
        StreamingError: The method cannot run this model's layers.
    """
    sweep_dir, candidate = job.sweep_dir, job.candidate
    target = sweep_dir.plan_file(candidate)
    if target.exists():
        return
    sweep_dir.begin()
    file = sweep_dir.work / STATISTICS
    statistics = get_or_create("statistics", file, lambda: Statistics.load(file))
    method = method_of(candidate.method)
    # Opening the model is not what a plan takes.
    home = _home(sweep_dir) if needs_model(method, candidate.options) else None
    began = time.perf_counter()
    plan = make_plan(
        statistics,
        candidate.task,
        method,
        candidate.counts,
        seed=candidate.seed,
        options=candidate.options,
        open_oracle=None
        if home is None
        else lambda windows: _oracle(sweep_dir, candidate.task, windows),
    )
    leave(target, {"seconds": time.perf_counter() - began, "plan": plan.to_json()})


def run_judge_job(job: JudgeJob) -> None:
    """Judge a plan on every task and leave the judgement in the work directory.

    Args:
        job: Which.

    Raises:
        SpreadError: This machine does not see the files, or has other versions.
        TaskFileError: A line cannot be scored.
        CheckpointError: The compressed model answers NaN or infinity.
    """
    sweep_dir = job.sweep_dir
    target = sweep_dir.score_file(job.decision)
    if target.exists():
        return
    sweep_dir.begin()
    tokenizer = load_tokenizer(sweep_dir.model)
    model = _model(sweep_dir) if sweep_dir.whole else open_streamed(sweep_dir.model).moe
    sizes = Sizes.of(model, job.plan.experts_per_layer, job.plan.widths(model.shape))
    with _compressed(sweep_dir, job) as scorer:
        scores, seconds = judge(sweep_dir, scorer, tokenizer)
    CandidateEvaluation(scores=scores, sizes=sizes, seconds=seconds).save(target)


def read_plan(sweep_dir: SweepDir, candidate: Candidate) -> tuple[Plan, float]:
    """Read what a finished job made.

    Args:
        sweep_dir: The sweep.
        candidate: Which.

    Returns:
        The plan, and the seconds that it took.
    """
    found = parse_strict(read_file(sweep_dir.plan_file(candidate)))
    return Plan.from_json(found["plan"], str(sweep_dir.plan_file(candidate))), float(
        found["seconds"]
    )


def _model(sweep_dir: SweepDir) -> MoeModel:
    return get_or_create("model", sweep_dir.model, lambda: load_model(sweep_dir.model))


def _oracle(sweep_dir: SweepDir, task: str, windows: Sequence[Window]) -> LayerOracle:
    """Return one oracle per task for all plans: it remembers what fractions share."""
    key = (sweep_dir.model, sweep_dir.work, task)
    return get_or_create("oracle", key, lambda: LayerOracle(_home(sweep_dir), windows))


def _home(sweep_dir: SweepDir) -> LayerProvider:
    if sweep_dir.whole:
        return InMemoryLayers(_model(sweep_dir))
    return get_or_create(
        "home", sweep_dir.model, lambda: StreamedLayers(open_streamed(sweep_dir.model))
    )


@contextlib.contextmanager
def _compressed(sweep_dir: SweepDir, job: JudgeJob) -> Iterator[Scorer]:
    """Yield a scorer of what the plan makes of the model."""
    if sweep_dir.whole:
        model = _model(sweep_dir)
        with applied(model, job.plan):
            yield TorchScorer(model)
        return
    streamed = open_streamed(sweep_dir.model)
    job.plan.validate(streamed.moe.shape)
    plans = {plan.layer: plan for plan in job.plan.layers}
    layers = {layer.index: layer for layer in streamed.moe.layers}

    def change(index: int) -> contextlib.AbstractContextManager[None]:
        if index not in layers:
            return contextlib.nullcontext()
        return applied_layer(layers[index], plans[index])

    outputs = WorkDirectory(sweep_dir.work).empty_directory(f"outputs-{job.decision}")
    yield TorchScorer(StreamedLayers(streamed, inside=change), work=WorkDirectory(outputs))
    shutil.rmtree(outputs)
