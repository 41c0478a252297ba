"""The names that a bundle is made of: targets, precisions, tasks, files and graph outputs.

Every package of edgemoe takes them from here. The standard library only, so that a command
that prints its help imports nothing else.
"""

from __future__ import annotations

import re
from typing import Literal, get_args

TARGETS = ("cpu", "cuda", "tensorrt", "tensorrt-rtx", "jetson-orin", "jetson-thor")
"""Machines that a bundle is exported for, as `--target` says them."""

Flavour = Literal["ort", "tensorrt"]
"""Whose operators the graphs of a bundle use."""

FLAVOURS: tuple[Flavour, ...] = get_args(Flavour)
PRECISIONS = ("fp32", "fp16", "int8", "int4")
"""Number formats of the weights, as `--precision` says them."""

BUNDLE_FORMAT = "edgemoe.bundle"
SCHEMA_VERSION = 2
"""Version of manifest.json that is written; version 1 is read, too."""

MANIFEST_FILE = "manifest.json"
TOKENIZER_FILE = "tokenizer.json"
SHARED_WEIGHTS_FILE = "shared.onnx.data"
"""Weights that two or more tasks read."""

ENGINES_FOLDER = "engines"
"""TensorRT engines, which are built on the device: the manifest does not list them."""

EXPERTS_USED = "experts_used"
"""Output of graphs whose tokens choose their number of experts; see `Backend.experts_used`."""

UNNAMED_TASK = "model"
"""Name of the only task of a bundle that was exported without one."""

RESERVED_TASK_NAME = "shared"
"""No task of a bundle has it: its weights would lie in `SHARED_WEIGHTS_FILE`."""

TASK_NAME_RULE = "1 to 64 letters, digits, '.', '_' or '-'"
"""The rule of `is_task_name`, for error messages."""

_TASK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def is_task_name(name: str) -> bool:
    """Return whether a task may have this name: it becomes a part of file names.

    Args:
        name: 1 to 64 letters, digits, `.`, `_` or `-`, the first one a letter or a digit, and
            no two dots in a row.
    """
    return _TASK_NAME.fullmatch(name) is not None and ".." not in name


def graph_file(task: str) -> str:
    """Return the name of a task's ONNX file."""
    return f"{task}.onnx"


def weights_file(task: str) -> str:
    """Return the name of the file of the weights that only this task reads."""
    return f"{task}.onnx.data"
