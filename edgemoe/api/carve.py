"""Turn a dense checkpoint into a Mixture of Experts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from edgemoe.api.arguments import files_of
from edgemoe.api.checks import check_checkpoint, check_output
from edgemoe.api.extras import needs
from edgemoe.api.running import running
from edgemoe.carve.options import CarveOptions
from edgemoe.chat_tasks import load_task
from edgemoe.errors import ArgumentError, CarveError
from edgemoe.file_kinds import describe_mistake, identify
from edgemoe.staging import reserved
from edgemoe.token_check import check_texts, check_tokens
from edgemoe_runtime.input_files import read_file
from edgemoe_runtime.messages import quote

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgemoe.api.arguments import StrPath
    from edgemoe.carve.carve import CarveReport
    from edgemoe.progress import OnProgress


def carve(
    dense: StrPath,
    output: StrPath,
    *,
    experts: int = 16,
    shared_fraction: float = 1 / 3,
    top_k: int = 6,
    data: StrPath | Sequence[str] | None = None,
    learned: StrPath | None = None,
    max_tokens: int = 8192,
    seed: int = 0,
    force: bool = False,
    on_progress: OnProgress | None = None,
) -> CarveReport:
    """Split the feed-forward layers of a dense checkpoint into shared and routed experts.

    Nothing is trained, and the same arguments give the same bytes. The checkpoint directory
    `output` is written.

    Source: CMoE, https://arxiv.org/abs/2502.04416.

    Args:
        dense: Checkpoint directory or GGUF file of a dense model.
        output: Checkpoint directory to write.
        experts: Routed experts of each layer, in [2, inf).
        shared_fraction: Fraction of the intermediate channels that every token uses, in (0, 1);
            the nearest that divides evenly is taken.
        top_k: Routed experts per token, in [1, experts].
        data: Calibration texts, or the file of one, plain or JSON Lines; None takes the topics
            of Python's manual.
        learned: File with what was learned on `dense`: a distilled MoE is rebuilt, and the
            shape is the file's.
        max_tokens: Calibration tokens to read at most, in [512, inf).
        seed: Decides the calibration windows and the first cluster centres.
        force: Whether `output` may be replaced.
        on_progress: Called with each `edgemoe.progress.ProgressEvent`; None draws a bar
            where stderr is a terminal.

    Returns:
        The shape that was carved, and the router's recall on the calibration tokens.

    Raises:
        ArgumentError: Both `learned` and `data` are given.
        CarveError: The checkpoint cannot be carved as asked, `learned` is of another one, or
            the texts are too short or not UTF-8.
        CheckpointError: The checkpoint cannot be read.
        TaskFileError: `data` is a JSON Lines file that breaks the format.
        OutputError: `output` exists and `force` is false, or cannot be written.
        MissingDependencyError: The extra `export` is not installed.

    Example:
        >>> from edgemoe.api.carve import carve
        >>> report = carve("dense", "carved", experts=4, top_k=2, data="code.jsonl")
        >>> share = report.active_fraction
    """
    source, target = Path(dense), Path(output)
    if learned is not None and data is not None:
        raise ArgumentError("--learned needs no calibration: leave out --data.")
    options = CarveOptions(
        experts=experts,
        shared_fraction=shared_fraction,
        top_k=top_k,
        max_tokens=max_tokens,
        seed=seed,
    )
    needs("export")
    check_output(target, source, *files_of(data, learned), force=force, directory=True)
    check_checkpoint(source)
    texts = [] if learned is not None else _read_texts(data, source)
    with (
        running("export", on_progress=on_progress),
        reserved(target, force=force, directory=True),
    ):
        from edgemoe.carve.carve import carve_checkpoint, rebuild_checkpoint

        if learned is not None:
            return rebuild_checkpoint(source, target, learned=Path(learned), force=force)
        return carve_checkpoint(source, target, texts=texts, options=options, force=force)


def _read_texts(data: StrPath | Sequence[str] | None, model: Path) -> list[str]:
    if data is None:
        import pydoc_data.topics

        return [text for _, text in sorted(pydoc_data.topics.topics.items())]
    if not isinstance(data, (str, os.PathLike)):
        check_texts(model, ((text, f"text {n}") for n, text in enumerate(data, start=1)))
        return list(data)
    path = Path(data)
    if path.suffix == ".jsonl":
        task = load_task("data", path, model)
        check_tokens(model, [task])
        return [record.calibration_text for record in task.records]
    kind = identify(path).name
    if kind not in ("text", "json", "task file", "other", "missing", "directory"):
        raise CarveError(f"calibration text must be text, got {describe_mistake(path)}.")
    try:
        text = read_file(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise CarveError(
            f"calibration text must be UTF-8, got {quote(str(path))} with the byte "
            f"0x{error.object[error.start]:02x}. Convert it to UTF-8."
        ) from error
    lines = ((line, f"{path}, line {n}") for n, line in enumerate(text.split("\n"), start=1))
    check_texts(model, lines)
    return [text]
