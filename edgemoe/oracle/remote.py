"""Ask an oracle's questions on other processes.

A job's answer depends on the model, the tokens and the job alone, so where it runs is no part
of it. Nothing large is sent or written: each worker opens the checkpoint itself, and runs the
layers before the one that a job is about, going on from its last job where it can. That is one
pass over the tokens for each worker, where jobs together are many.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from edgemoe.layerwise.provider import InMemoryLayers, StreamedLayers
from edgemoe.models.checkpoint import load_model
from edgemoe.models.opening import open_streamed
from edgemoe.oracle.oracle import LayerOracle
from edgemoe.parallel.agreement import check_agreement
from edgemoe.parallel.worker_cache import get_or_create
from edgemoe.versions import library_versions

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from edgemoe.calibrate.sample import Window
    from edgemoe.layerwise.provider import LayerProvider
    from edgemoe.parallel.workers import Workers

Job = TypeVar("Job")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class WorkerPool:
    """Workers that have a checkpoint open.

    Attributes:
        workers: Where jobs run.
        model: Checkpoint directory, absolute; all workers see it.
        whole: Whether each loads it whole; else it is read one decoder layer at a time.
        threads: CPU threads of a job; None leaves what the worker has.
    """

    workers: Workers
    model: Path
    whole: bool
    threads: int | None

    def map(
        self,
        function: Callable[[LayerOracle, Job], Result],
        jobs: Sequence[Job],
        windows: Sequence[Window],
        description: str,
    ) -> list[Result]:
        """Answer questions about the checkpoint.

        Args:
            function: A function of a module that workers can import.
            jobs: Its second arguments; they and the results are pickled.
            windows: The tokens.
            description: What the progress bar says.

        Returns:
            The results in the order of the jobs.

        Raises:
            SpreadError: A worker does not see the checkpoint, has other versions, or dies.
            Exception: What the first job that failed raised.
        """
        questions = [
            RemoteCall(
                model=self.model,
                whole=self.whole,
                threads=self.threads,
                versions=library_versions(),
                windows=tuple(windows),
                function=function,
                job=job,
            )
            for job in jobs
        ]
        return self.workers.map(answer, questions, description)


@dataclass(frozen=True, kw_only=True)
class RemoteCall:
    """One job, and what its worker must know besides.

    Attributes:
        model: As in `WorkerPool`.
        whole: As in `WorkerPool`.
        threads: As in `WorkerPool`.
        versions: What the worker must have too, or its bits may differ.
        windows: The tokens.
        function: What answers.
        job: Its second argument.
    """

    model: Path
    whole: bool
    threads: int | None
    versions: Mapping[str, str]
    windows: tuple[Window, ...]
    function: Callable[[LayerOracle, Any], Any]
    job: Any


def answer(question: RemoteCall) -> Any:
    """Answer a question, in a worker.

    Args:
        question: The question.

    Returns:
        What its function returns.

    Raises:
        SpreadError: This machine does not see the checkpoint, or has other versions.
        CheckpointError: The checkpoint is missing, unsafe or inconsistent.
        StreamingError: Its layers cannot be run one by one.
    """
    import torch

    check_agreement({"checkpoint": question.model}, question.versions)
    if question.threads is not None:
        torch.set_num_threads(question.threads)
    model = (question.model, question.whole)
    home = get_or_create("home of a crew", model, lambda: _open(question))
    oracle = get_or_create(
        "oracle", (model, question.windows), lambda: LayerOracle(home, question.windows)
    )
    with oracle.open():
        return question.function(oracle, question.job)


def _open(question: RemoteCall) -> LayerProvider:
    if question.whole:
        return InMemoryLayers(load_model(question.model))
    return StreamedLayers(open_streamed(question.model))
