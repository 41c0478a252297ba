"""The job of a sweep that recovers what a plan makes, before it is judged once more."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from edgemoe.apply.in_memory import apply_plan
from edgemoe.evaluate.torch_scorer import TorchScorer
from edgemoe.models.checkpoint import load_model, load_tokenizer
from edgemoe.models.saving import save_model
from edgemoe.parallel.worker_cache import clear_cache
from edgemoe.recover.recovery import recover_checkpoint
from edgemoe.staging import staged_directory
from edgemoe.sweep.evaluation import CandidateEvaluation, judge
from edgemoe.sweep.sweep_dir import CALIBRATION
from edgemoe.tasks import TaskFile

if TYPE_CHECKING:
    from edgemoe.plans.plan import Plan
    from edgemoe.recover.options import RecoverOptions
    from edgemoe.sweep.sweep_dir import SweepDir


@dataclass(frozen=True, kw_only=True)
class RecoverJob:
    """Carry out a plan, recover what it makes on the task's calibration lines, and judge it.

    The plan itself must have been judged.
    """

    sweep_dir: SweepDir
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
    sweep_dir = job.sweep_dir
    target = sweep_dir.recovered_file(job.key)
    if target.exists():
        return
    sweep_dir.begin()
    # A recovery holds two models of its own.
    clear_cache()
    folder = target.with_suffix("")
    folder.mkdir(exist_ok=True)
    compressed, recovered = folder / "compressed", folder / "checkpoint"
    began = time.perf_counter()
    if not compressed.exists():
        with staged_directory(compressed) as staged:
            save_model(
                apply_plan(load_model(sweep_dir.model), job.plan),
                staged,
                source=sweep_dir.model,
            )
    if not recovered.exists():
        lines = TaskFile.load(job.task, sweep_dir.lines_file(CALIBRATION, job.task))
        recover_checkpoint(
            compressed,
            [lines],
            recovered,
            method=job.method,
            teacher=sweep_dir.model,
            options=job.options,
        )
    recover_seconds = time.perf_counter() - began
    scorer = TorchScorer(load_model(recovered))
    scores, seconds = judge(sweep_dir, scorer, load_tokenizer(recovered))
    judgement = CandidateEvaluation(
        scores=scores,
        sizes=CandidateEvaluation.load(
            sweep_dir.score_file(job.decision), sweep_dir.tasks
        ).sizes,
        seconds=seconds,
        recover_seconds=recover_seconds,
    )
    judgement.save(target)
    shutil.rmtree(folder)
