"""Copy what edgemoe wrote, for somebody who may not read the text that it was made from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgemoe.api.running import running
from edgemoe.errors import ArgumentError
from edgemoe.file_kinds import describe_mistake, identify
from edgemoe.staging import reserved, staged_directory
from edgemoe_runtime.input_files import parse_strict, read_file

if TYPE_CHECKING:
    from edgemoe.api.arguments import StrPath

_REPORT = "report.json"
_STATISTICS = "statistics.safetensors"
# Lines that a sweep judged by, or chose experts by.
_TEXTS = ("held-out", "calibration")
_PATHS = ("model", "file", "held_out_file")


def redact(path: StrPath, output: StrPath, *, force: bool = False) -> None:
    """Copy statistics or the report of a sweep without text, and without paths of this machine.

    Names of tasks stay, and digests of lines: who can guess a line can see that it was one.

    Args:
        path: Statistics file, or directory of a report.
        output: Where the copy goes.
        force: Whether an existing `output` may be replaced.

    Raises:
        ArgumentError: It is something else, or a plan that needs its text.
        StatisticsError: The statistics are malformed.
        OutputError: `output` exists and `force` is false, or cannot be written.
        MissingDependencyError: The extra `export` is not installed.

    Example:
        >>> from edgemoe.api.redact import redact
        >>> redact("code.stats", "shared.stats")
    """
    source, target = Path(path), Path(output)
    is_report = source.is_dir() and (source / _REPORT).exists()
    with (
        running("export"),
        reserved(target, force=force, directory=is_report, inputs=[source]),
    ):
        if is_report:
            _copy_report(source, target, force=force)
        elif identify(source).name == "statistics":
            _copy_statistics(source, target, force=force)
        else:
            raise ArgumentError(
                "--redact with -o copies statistics or the report of a sweep, got "
                f"{describe_mistake(source)}. Bundles and checkpoints hold no calibration "
                "text; a plan that does needs it to be applied."
            )


def _copy_statistics(source: Path, target: Path, *, force: bool) -> None:
    from edgemoe.calibrate.statistics import Statistics

    Statistics.load(source).without_tokens().save(target, force=force)


def _copy_report(source: Path, target: Path, *, force: bool) -> None:
    from edgemoe.plans.plan import Plan

    with staged_directory(target, force=force) as staged:
        for file in sorted(source.rglob("*")):
            inner = file.relative_to(source)
            if not file.is_file() or file.is_symlink() or inner.parts[0] in _TEXTS:
                continue
            copy = staged / inner
            copy.parent.mkdir(parents=True, exist_ok=True)
            if inner.name == _STATISTICS:
                _copy_statistics(file, copy, force=False)
            elif inner.name == _REPORT:
                report = _without_paths(parse_strict(read_file(file)))
                text = json.dumps(report, indent=1, ensure_ascii=False)
                copy.write_text(f"{text}\n", encoding="utf-8")
            elif inner.suffix != ".json" or not Plan.load(file).holds_texts:
                shutil.copyfile(file, copy)


def _without_paths(value: Any) -> Any:
    """Return a JSON value with names of files in place of their paths."""
    if isinstance(value, dict):
        return {
            name: Path(entry).name
            if name in _PATHS and isinstance(entry, str)
            else _without_paths(entry)
            for name, entry in value.items()
        }
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    return value
