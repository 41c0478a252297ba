"""Checkpointing of an export: its staged directory, and the results of its finished steps.

An export from memory takes minutes and leaves nothing when it is interrupted. One of a
checkpoint that is larger takes hours: finished steps are kept in `<output>.partial`, and the
same command resumes from there. A resumed export gives the same bytes.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, TypeVar

import onnxruntime

from edgemoe.calibrate.statistics import Statistics
from edgemoe.errors import EdgemoeError, OutputError
from edgemoe.evaluate.evaluation import Evaluation
from edgemoe.resume import WorkDirectory, publish, resumable, resume_key
from edgemoe.staging import staged_directory
from edgemoe_exporters.sources.eager_run import runs_from_bytes, runs_to_bytes
from edgemoe_exporters.validation.parity import Parity
from edgemoe_runtime.input_files import parse_strict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from edgemoe.models.checkpoint import Checkpoint
    from edgemoe.models.fingerprint import FileHashes
    from edgemoe.plans.plan import Plan
    from edgemoe.tasks import TaskFile
    from edgemoe_exporters.request import ExportRequest
    from edgemoe_exporters.sources.eager_run import EagerRun

_STEPS = "steps"
_BUNDLE = "bundle"
_LIBRARIES = ("onnx", "onnx-ir", "onnxscript")

Result = TypeVar("Result")


@dataclass(frozen=True)
class ExportCheckpointing:
    """The directories of a running export, and the results of its finished steps.

    Attributes:
        staged: The directory that becomes the bundle.
        work: Where results of finished steps are kept; None where none are.
    """

    staged: Path
    work: WorkDirectory | None

    @property
    def journal(self) -> Path | None:
        """Where the weights that were written are recorded."""
        return None if self.work is None else self.work.path / "weights.jsonl"

    def fingerprint(self, hashes: FileHashes) -> str:
        """Hash the checkpoint, or return the hash of an earlier run.

        Args:
            hashes: Of its files, as far as they are known.

        Returns:
            As `edgemoe.models.fingerprint.fingerprint_checkpoint`.
        """
        if self.work is None:
            return hashes.fingerprint()
        hashes.remember(self.work)
        return hashes.fingerprint()

    def statistics(self, task: str, collect: Callable[[], Statistics]) -> Statistics:
        """Collect statistics of a task, or load those of an earlier run.

        Args:
            task: The task.
            collect: Collects them.

        Returns:
            Its statistics.
        """
        if self.work is None:
            return collect()
        path = self.work.path / f"{task}.statistics"
        if not path.exists():
            collect().save(path)
        return Statistics.load(path)

    def evaluation(
        self, task: str, when: str, evaluate: Callable[[], Evaluation]
    ) -> Evaluation:
        """Evaluate a task, or load the score of an earlier run.

        Args:
            task: The task.
            when: `before` or `after`.
            evaluate: Evaluates it.

        Returns:
            Its score.
        """
        score: Evaluation = self._kept(
            f"{task}.{when}.json",
            evaluate,
            _as_json,
            lambda content: Evaluation.from_json(parse_strict(content)),
        )
        return score

    def eager(self, task: str, run: Callable[[], list[EagerRun]]) -> list[EagerRun]:
        """Run the eager model, or load the logits of an earlier run.

        Args:
            task: Whose experts it has.
            run: Runs it.

        Returns:
            Its logits.
        """
        return self._kept(f"{task}.eager", run, runs_to_bytes, runs_from_bytes)

    def parity(self, task: str, measure: Callable[[], Parity]) -> Parity:
        """Compare a graph with the eager model, or load the result of an earlier run.

        Args:
            task: Whose graph it is.
            measure: Compares them.

        Returns:
            Their differences.
        """
        parity: Parity = self._kept(
            f"{task}.parity.json",
            measure,
            _as_json,
            lambda content: Parity(**parse_strict(content)),
        )
        return parity

    def written_bytes(self) -> int:
        """Return the bytes of the bundle that are on the disk."""
        return sum(path.stat().st_size for path in self.staged.rglob("*") if path.is_file())

    def _kept(
        self,
        name: str,
        make: Callable[[], Result],
        encode: Callable[[Result], bytes],
        decode: Callable[[bytes], Result],
    ) -> Result:
        if self.work is None:
            return make()
        path = self.work.path / name
        if path.exists():
            return decode(path.read_bytes())
        made = make()
        self.work.write_bytes(name, encode(made))
        return made


@contextlib.contextmanager
def open_checkpointing(
    request: ExportRequest, key: Mapping[str, Any], *, kept: bool
) -> Iterator[ExportCheckpointing]:
    """Make the directory of an export, or open that of an interrupted one.

    Args:
        request: The export.
        key: Everything that decides its result, as JSON values.
        kept: Whether finished steps are kept.

    Yields:
        Where to write; the bundle is put in its place when the block ends well.

    Raises:
        OutputError: The output exists, there is other unfinished work for it, or the disk
            refuses.
    """
    if not kept:
        with staged_directory(request.output, force=request.force) as staged:
            yield ExportCheckpointing(staged, None)
        return
    with resumable(request.output, key, f"{_STEPS}/**/*.*", force=request.force) as whole:
        steps = whole.path / _STEPS
        steps.mkdir(exist_ok=True)
        staged = whole.path / _BUNDLE
        staged.mkdir(exist_ok=True)
        try:
            yield ExportCheckpointing(staged, WorkDirectory(steps))
        except EdgemoeError as error:
            if not isinstance(error, OutputError):
                # A refused export will be refused again.
                whole.remove(_STEPS)
            raise
        publish(staged, request.output, force=request.force)


def key_of(
    request: ExportRequest,
    precision: str,
    checkpoint: Checkpoint,
    tasks: Mapping[str, TaskFile],
    plans: Mapping[str, Plan],
) -> dict[str, Any]:
    """Return everything that decides the result of an export.

    Args:
        request: The export.
        precision: Of its weights.
        checkpoint: The checkpoint.
        tasks: The task files, with all examples.
        plans: Plans that were given.

    Returns:
        JSON values, for `open_checkpointing`.
    """
    return resume_key(
        "export",
        checkpoint,
        tokenizer=checkpoint.tokenizer_sha256,
        tasks=tasks,
        plans=plans,
        options=[
            list(request.names),
            request.target,
            precision,
            request.keep,
            request.method,
            request.seed,
            request.calibration_tokens,
            request.held_out_tokens,
            request.ladder,
            request.static_shapes,
        ],
        versions={
            **{name: version(name) for name in _LIBRARIES},
            "onnxruntime": onnxruntime.__version__,
        },
    )


def _as_json(value: Any) -> bytes:
    return (json.dumps(asdict(value), indent=1) + "\n").encode()
