"""The arguments of scripts that compare on tasks: a model, its task files, and a work folder.

The folder of --tasks holds NAME.train.jsonl and NAME.test.jsonl for each task, as
`python -m benchmarks.reference_moe.corpus` writes them.
"""

from __future__ import annotations

from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

if TYPE_CHECKING:
    from collections.abc import Callable

_Command = TypeVar("_Command", bound="Callable[..., object]")

# Tasks of the corpus that differ most in how hard the reference model finds them.
_SEVERAL = ("bible", "code", "logs")


def on_one_task(command: _Command) -> _Command:
    """Declare MODEL, --tasks, --task, --work and --threads.

    Args:
        command: Takes `model`, `tasks`, `task`, `work` and `threads`.

    Returns:
        The same with its parameters declared.
    """
    return _declare(command, click.option("--task", default="code", show_default=True))


def on_several_tasks(command: _Command) -> _Command:
    """Declare the same, with a --task that may be repeated.

    Args:
        command: Takes `model`, `tasks`, `names`, `work` and `threads`.

    Returns:
        The same with its parameters declared.
    """
    return _declare(command, click.option("--task", "names", multiple=True, default=_SEVERAL))


def _declare(command: _Command, task: Callable[[_Command], _Command]) -> _Command:
    existing = click.Path(path_type=Path, exists=True)
    declared: list[Callable[[_Command], _Command]] = [
        click.argument("model", type=existing),
        click.option("--tasks", type=existing, required=True),
        task,
        click.option("--work", type=click.Path(path_type=Path), required=True),
        click.option("--threads", default=1, show_default=True),
    ]
    # As decorators stand: the last one is applied first, so that --help keeps this order.
    return reduce(lambda found, declare: declare(found), reversed(declared), command)
