"""Two jobs of a sweep, which run wherever there are workers: make a plan, judge a plan.

Each job leaves a file in the sweep's work directory and does nothing where the file is there
already. Plans that decide the same are judged once: a judgement's file is named after the
decision. A worker keeps the model, in memory whole, from one job to the next.
"""

from __future__ import annotations

import contextlib
import json
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
from edgemoe.parallel.worker_cache import hold
from edgemoe.plans.plan import Plan
from edgemoe.prune.registry import make_plan, needs_model
from edgemoe.resume import WorkDirectory
from edgemoe.sweep.evaluation import Judgement, judge
from edgemoe.sweep.request import method_of
from edgemoe.sweep.sizes import Sizes
from edgemoe.sweep.sweep_dir import STATISTICS, leave

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from edgemoe.calibrate.sample import Window
    from edgemoe.evaluate.scorer import Scorer
    from edgemoe.layerwise.provider import LayerProvider
    from edgemoe.models.contract import MoeModel
    from edgemoe.sweep.candidates import Cut
    from edgemoe.sweep.sweep_dir import Site


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
    site.begin()
    file = site.work / STATISTICS
    statistics = hold("statistics", file, lambda: Statistics.load(file))
    method = method_of(cut.method)
    # Opening the model is not what a plan takes.
    home = _home(site) if needs_model(method, cut.options) else None
    began = time.perf_counter()
    plan = make_plan(
        statistics,
        cut.task,
        method,
        cut.counts,
        seed=cut.seed,
        options=cut.options,
        open_oracle=None if home is None else lambda windows: _oracle(site, cut.task, windows),
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
    site = job.site
    target = site.score_file(job.decision)
    if target.exists():
        return
    site.begin()
    tokenizer = load_tokenizer(site.model)
    model = _model(site) if site.whole else open_streamed(site.model).moe
    sizes = Sizes.of(model, job.plan.experts_per_layer, job.plan.widths(model.shape))
    with _compressed(site, job) as scorer:
        scores, seconds = judge(site, scorer, tokenizer)
    Judgement(scores=scores, sizes=sizes, seconds=seconds).save(target)


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


def _model(site: Site) -> MoeModel:
    return hold("model", site.model, lambda: load_model(site.model))


def _oracle(site: Site, task: str, windows: Sequence[Window]) -> LayerOracle:
    """Return one oracle per task for all plans: it remembers what fractions share."""
    key = (site.model, site.work, task)
    return hold("oracle", key, lambda: LayerOracle(_home(site), windows))


def _home(site: Site) -> LayerProvider:
    if site.whole:
        return InMemoryLayers(_model(site))
    return hold("home", site.model, lambda: StreamedLayers(open_streamed(site.model)))


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
    yield TorchScorer(StreamedLayers(streamed), work=WorkDirectory(outputs), inside=change)
    shutil.rmtree(outputs)
