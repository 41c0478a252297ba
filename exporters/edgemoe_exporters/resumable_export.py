"""Checkpointing of an export: its staged directory, and the results of its finished steps.

Two kinds of results are kept beside the output until the bundle is whole. Statistics, scores
and recovered checkpoints are in `<output>.kept.partial`, named by what they were made from: an
export that was refused or interrupted leaves them, and the next one takes what it needs, with
another `--keep` or `--max-drop` too. Of a checkpoint that is larger than memory, whose export
takes hours, the weights that were written are in `<output>.partial`, and the same command
resumes from there. A resumed export gives the same bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from edgemoe.calibrate.statistics import Statistics
from edgemoe.errors import EdgemoeError, OutputError
from edgemoe.evaluate.evaluation import Evaluation
from edgemoe.resume import WorkDirectory, publish, resumable
from edgemoe.staging import staged_directory
from edgemoe_exporters.sources.eager_run import runs_from_bytes, runs_to_bytes
from edgemoe_exporters.validation.parity import Parity
from edgemoe_runtime.input_files import parse_strict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from edgemoe.models.weights.fingerprint import FileHashes
    from edgemoe_exporters.export_keys import ExportKeys
    from edgemoe_exporters.request import ExportRequest
    from edgemoe_exporters.sources.eager_run import EagerRun

_STEPS = "steps"
_BUNDLE = "bundle"
_KEPT = "kept"
_SCRATCH = "scratch"
# What is kept has a kind and a hash in its name.
_WORTH = f"{_KEPT}/*.*.*"
_PLURALS = {
    "statistics": "statistics",
    "score": "scores",
    "recovered": "recovered checkpoints",
}

Result = TypeVar("Result")


@dataclass(frozen=True)
class ExportCheckpointing:
    """The directories of a running export, and the results of its finished steps.

    Attributes:
        staged: The directory that becomes the bundle.
        work: Where steps of this very export are kept; None where none are.
        kept: Where results that other exports of the checkpoint may use are kept.
        scratch: An empty directory for graphs that are measured and thrown away.
        earlier: Names of what an earlier attempt kept there.
        reused: What of it was used, such as `the statistics of code`.
    """

    staged: Path
    work: WorkDirectory | None
    kept: WorkDirectory
    scratch: Path
    earlier: frozenset[str] = frozenset()
    reused: list[str] = field(default_factory=list)

    @property
    def journal(self) -> Path | None:
        """Where the weights that were written are recorded."""
        return None if self.work is None else self.work.path / "weights.jsonl"

    def fingerprint(self, hashes: FileHashes) -> str:
        """Hash the checkpoint, or return the hash of an earlier run.

        Args:
            hashes: Of its files, as far as they are known.

        Returns:
            As `edgemoe.models.weights.fingerprint.fingerprint_checkpoint`.
        """
        if self.work is None:
            return hashes.fingerprint()
        hashes.remember(self.work)
        return hashes.fingerprint()

    def statistics(
        self, task: str, key: Mapping[str, Any], collect: Callable[[], Statistics]
    ) -> Statistics:
        """Collect statistics of a task, or load those of an earlier export.

        Args:
            task: The task.
            key: What decides them besides the checkpoint, as JSON values.
            collect: Collects them.

        Returns:
            Its statistics.
        """
        path = self.kept.path / _name_kept(task, "statistics", key)
        if self._is_kept(path, f"the statistics of {task}"):
            return Statistics.load(path)
        collect().save(path)
        return Statistics.load(path)

    def evaluation(
        self, task: str, what: str, key: Mapping[str, Any], evaluate: Callable[[], Evaluation]
    ) -> Evaluation:
        """Evaluate a task, or load the score of an earlier export.

        Args:
            task: The task.
            what: What is scored, such as `checkpoint`.
            key: What decides its score besides the checkpoint, as JSON values.
            evaluate: Evaluates it.

        Returns:
            Its score.
        """
        name = _name_kept(task, "score", {"what": what, **key})
        path = self.kept.path / name
        if self._is_kept(path, f"the score of the {what} on {task}"):
            return Evaluation.from_json(parse_strict(path.read_bytes()))
        score = evaluate()
        self.kept.write_bytes(name, _as_json(score))
        return score

    def recovered(
        self, task: str, key: Mapping[str, Any], make: Callable[[Path], None]
    ) -> Path:
        """Make a recovered checkpoint, or find that of an earlier export.

        Args:
            task: The task.
            key: What decides it besides the checkpoint, as JSON values.
            make: Makes it; what it writes there and beside it survives an interruption.

        Returns:
            Its directory.
        """
        folder = self.kept.path / _name_kept(task, "recovered", key)
        path = folder / "checkpoint"
        if not self._is_kept(path, f"the recovered checkpoint of {task}"):
            folder.mkdir(exist_ok=True)
            make(path)
        return path

    def _is_kept(self, path: Path, what: str) -> bool:
        name = path.relative_to(self.kept.path).parts[0]
        found = path.exists()
        if found and name in self.earlier and what not in self.reused:
            self.reused.append(what)
        return found

    def eager(self, task: str, run: Callable[[], list[EagerRun]]) -> list[EagerRun]:
        """Run the eager model, or load the logits of an earlier run.

        Args:
            task: Whose experts it has.
            run: Runs it.

        Returns:
            Its logits.
        """
        return self._resumed(f"{task}.eager", run, runs_to_bytes, runs_from_bytes)

    def parity(self, task: str, measure: Callable[[], Parity]) -> Parity:
        """Compare a graph with the eager model, or load the result of an earlier run.

        Args:
            task: Whose graph it is.
            measure: Compares them.

        Returns:
            Their differences.
        """
        parity: Parity = self._resumed(
            f"{task}.parity.json",
            measure,
            _as_json,
            lambda content: Parity(**parse_strict(content)),
        )
        return parity

    def written_bytes(self) -> int:
        """Return the bytes of the bundle that are on the disk."""
        return sum(path.stat().st_size for path in self.staged.rglob("*") if path.is_file())

    def _resumed(
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
    request: ExportRequest, keys: ExportKeys, *, kept: bool
) -> Iterator[ExportCheckpointing]:
    """Make the directory of an export, or open that of an interrupted one.

    Args:
        request: The export.
        keys: What decides its result.
        kept: Whether written weights are kept, too.

    Yields:
        Where to write; the bundle is put in its place when the block ends well.

    Raises:
        OutputError: The output exists, there is other unfinished work for it, or the disk
            refuses.
    """
    with (
        resumable(
            _kept_for(request.output), keys.checkpoint, _WORTH, force=request.force
        ) as all_,
        _told_if_refused(all_),
    ):
        results = WorkDirectory(all_.path / _KEPT)
        results.path.mkdir(exist_ok=True)
        earlier = frozenset(path.name for path in results.path.iterdir())
        scratch = all_.empty_directory(_SCRATCH)
        if not kept:
            with staged_directory(request.output, force=request.force) as staged:
                yield ExportCheckpointing(staged, None, results, scratch, earlier)
            return
        key = {**keys.checkpoint, **keys.attempt}
        with resumable(request.output, key, f"{_STEPS}/**/*.*", force=request.force) as whole:
            steps, staged = whole.path / _STEPS, whole.path / _BUNDLE
            steps.mkdir(exist_ok=True)
            staged.mkdir(exist_ok=True)
            try:
                yield ExportCheckpointing(
                    staged, WorkDirectory(steps), results, scratch, earlier
                )
            except EdgemoeError as error:
                if not isinstance(error, OutputError):
                    # Refused weights would be refused again.
                    whole.remove(_STEPS)
                raise
            publish(staged, request.output, force=request.force)


def _kept_for(output: Path) -> Path:
    """Name what results are kept for, beside the weights of an export that was interrupted."""
    return output.with_name(f"{output.name}.{_KEPT}")


@contextlib.contextmanager
def _told_if_refused(work: WorkDirectory) -> Iterator[None]:
    try:
        yield
    except EdgemoeError as error:
        if not isinstance(error, OutputError):
            _say_what_is_kept(error, work.path / _KEPT)
        raise
    finally:
        work.remove(_SCRATCH)


def _say_what_is_kept(error: EdgemoeError, folder: Path) -> None:
    """Add to a refusal what the next attempt finds, how large it is and how it goes."""
    names = sorted({path.name.split(".")[-3] for path in folder.glob("*.*.*")})
    if not names or not error.args:
        return
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    error.args = (
        f"{error.args[0]} Kept in {folder.parent} ({_megabytes(size)}) for the next attempt "
        f"with this -o: {', '.join(_PLURALS[name] for name in names)}; remove the directory "
        "when nobody needs it.",
        *error.args[1:],
    )


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size > 1e5 else f"{size / 1e3:.1f} kB"


def _name_kept(task: str, kind: str, key: Mapping[str, Any]) -> str:
    """Name a result by what it was made from."""
    content = json.dumps(key, sort_keys=True)
    digest = hashlib.sha256(content.encode()).hexdigest()[:20]
    suffix = {"statistics": "safetensors", "score": "json", "recovered": "folder"}[kind]
    return f"{task}.{kind}.{digest}.{suffix}"


def _as_json(value: Any) -> bytes:
    return (json.dumps(asdict(value), indent=1) + "\n").encode()
