"""What the verbs take: paths, tasks, statistics, plans and options, by file or as objects."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from edgemoe.chat_tasks import load_task
from edgemoe.errors import ArgumentError, PlanError, StatisticsError, TaskFileError
from edgemoe.file_kinds import identify
from edgemoe.tasks import TaskFile, check_names_differ
from edgemoe.token_check import check_tokens
from edgemoe_runtime.messages import clip

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from edgemoe.calibrate.statistics import Statistics
    from edgemoe.models.checkpoint import Checkpoint
    from edgemoe.plans.plan import Plan

StrPath: TypeAlias = "str | os.PathLike[str]"
Tasks: TypeAlias = "Mapping[str, StrPath] | Sequence[TaskFile]"
OneTask: TypeAlias = "TaskFile | Mapping[str, StrPath]"
Options: TypeAlias = "Mapping[str, object] | Sequence[str]"


def read_tasks(tasks: Tasks, model: Path) -> list[TaskFile]:
    """Load tasks that are given by file, and refuse tokens that the model does not know.

    Args:
        tasks: Files by name, or tasks that are loaded.
        model: Checkpoint or bundle that reads them; its template renders chats.

    Returns:
        The tasks in their order.

    Raises:
        TaskFileError: There is none, two have one name, or a file breaks a rule.
    """
    if isinstance(tasks, Mapping):
        read = _reader(model)
        loaded = [load_task(name, Path(path), model, read) for name, path in tasks.items()]
    else:
        loaded = list(tasks)
    check_names_differ([task.name for task in loaded])
    if not loaded:
        raise TaskFileError('there must be one task or more, got none. Give {"name": file}.')
    check_tokens(model, loaded)
    return loaded


def _reader(model: Path) -> Callable[[str], bytes | None] | None:
    """Return what reads the settings of a GGUF file; None for a directory."""
    if identify(model).name != "gguf":
        return None
    from edgemoe.models.gguf.reading import open_gguf

    found = open_gguf(model)
    return None if found is None else found.read


def read_task(task: OneTask, model: Path) -> TaskFile:
    """Load the one task of a verb that takes no more.

    Args:
        task: The task, or its file by its name.
        model: As in `read_tasks`.

    Returns:
        The task.

    Raises:
        TaskFileError: There is not one, or the file breaks a rule.
    """
    if isinstance(task, Mapping) and len(task) > 1:
        raise TaskFileError(
            f"there must be one task, got {clip(', '.join(task))}. Call once for each."
        )
    return read_tasks([task] if isinstance(task, TaskFile) else task, model)[0]


def task_paths(tasks: Tasks) -> dict[str, Path]:
    """Return the tasks' files without reading them.

    Args:
        tasks: As in `read_tasks`.

    Returns:
        Paths by name.
    """
    if isinstance(tasks, Mapping):
        return {name: Path(path) for name, path in tasks.items()}
    return {task.name: task.path for task in tasks}


def read_statistics(statistics: Statistics | StrPath) -> Statistics:
    """Load statistics that are given by file.

    Args:
        statistics: Statistics, or their file.

    Returns:
        The statistics.

    Raises:
        StatisticsError: The file is malformed.
    """
    from edgemoe.calibrate.statistics import Statistics

    return (
        statistics if isinstance(statistics, Statistics) else Statistics.load(Path(statistics))
    )


def check_measured(
    found: Statistics, given: Statistics | StrPath, model: Path, sha256: str, done: str
) -> Statistics:
    """Refuse statistics of another checkpoint.

    Args:
        found: The statistics.
        given: What the caller gave, for the message.
        model: The checkpoint, for the message.
        sha256: Its fingerprint.
        done: What is done to it, for the message, such as `pruned`.

    Returns:
        The statistics.

    Raises:
        StatisticsError: Another checkpoint was measured.
    """
    if found.checkpoint_sha256 != sha256:
        source = "statistics" if found is given else given
        raise StatisticsError(
            f"statistics must be of the checkpoint that is {done}, got {source} of checkpoint "
            f"{found.checkpoint_sha256[:12]} for {model}. Calibrate {model}."
        )
    return found


def check_plan(plan: Plan, checkpoint: Checkpoint) -> None:
    """Refuse a plan that does not fit; one of another checkpoint is told as that first.

    Args:
        plan: The plan.
        checkpoint: What it is to be carried out on; hashed only where the plan does not fit.

    Raises:
        PlanError: It does not fit.
    """
    try:
        plan.validate(checkpoint.shape)
    except PlanError:
        plan.validate(checkpoint.shape, checkpoint.sha256)
        raise


def load_plan(plan: Plan | StrPath) -> Plan:
    """Load a plan that is given by file.

    Args:
        plan: The plan, or its file.

    Returns:
        The plan.

    Raises:
        PlanError: The file is missing or breaks the format.
    """
    from edgemoe.plans.plan import Plan

    return plan if isinstance(plan, Plan) else Plan.load(Path(plan))


def files_of(*given: object) -> list[Path]:
    """Return those arguments that are files, which no output may replace.

    Args:
        given: Paths, objects and None.

    Returns:
        The paths among them.
    """
    return [Path(one) for one in given if isinstance(one, (str, os.PathLike))]


def option_texts(options: Options) -> list[str]:
    """Return options as the command line gives them, whose types methods know.

    Args:
        options: Values by name, or `NAME=VALUE` texts.

    Returns:
        `NAME=VALUE` each; a list of values has commas between them.
    """
    if not isinstance(options, Mapping):
        return list(options)
    return [
        f"{name}={','.join(map(str, value)) if isinstance(value, (list, tuple)) else value}"
        for name, value in options.items()
    ]


def as_path(path: StrPath | None) -> Path | None:
    """Return a path, or None where there is none.

    Args:
        path: The path.

    Returns:
        The same as a `pathlib.Path`.
    """
    return None if path is None else Path(path)


def as_float(number: float | None) -> float | None:
    """Return a number as the command line reads it: files then hold 1.0 where 1 was given.

    Args:
        number: A float, an integer or None.

    Returns:
        The float, or None.
    """
    return None if number is None else float(number)


def check_at_least_one(**given: int | None) -> None:
    """Refuse counts below one.

    Args:
        given: Counts by name; None is no count.

    Raises:
        ArgumentError: One is below one.
    """
    for name, count in given.items():
        if count is not None and count < 1:
            raise ArgumentError(f"{name} must be in [1, inf), got {count}.")
