"""The rule for the names of a bundle's tasks, which become parts of file names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgemoe.errors import ExportError
from edgemoe_runtime.bundle.names import RESERVED_TASK_NAME, TASK_NAME_RULE, is_task_name

if TYPE_CHECKING:
    from collections.abc import Sequence


def check_task_names(tasks: Sequence[str]) -> None:
    """Check that every task's name can be a file's name, and that no two are the same.

    Args:
        tasks: The names.

    Raises:
        ExportError: One breaks the rule.
    """
    for task in tasks:
        if not is_task_name(task) or task == RESERVED_TASK_NAME:
            raise ExportError(
                f"a task's name must be {TASK_NAME_RULE}, and not "
                f"'{RESERVED_TASK_NAME}', got {task!r}. Rename it in --task NAME=FILE."
            )
    if not tasks or len({task.lower() for task in tasks}) != len(tasks):
        raise ExportError(
            f"tasks must be at least one, and distinct in lower case too, got {list(tasks)}. "
            "Name each task once."
        )
