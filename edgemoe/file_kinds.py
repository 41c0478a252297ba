"""What a path is, told by what lies there: for messages that name a file given by mistake.

Nothing heavy is imported, and little is read: a header, the first line, a few names.
"""

from __future__ import annotations

import json
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from edgemoe_runtime.bundle.names import MANIFEST_FILE
from edgemoe_runtime.messages import clip, escape_controls

if TYPE_CHECKING:
    from pathlib import Path

Name: TypeAlias = Literal[
    "adapter", "bundle", "checkpoint", "directory", "engine", "engine key", "gguf", "graph",
    "json", "key file", "missing", "other", "pickle", "plan", "report", "special", "statistics",
    "task file", "text", "weights",
]  # fmt: skip

_HEAD_BYTES = 1 << 16
_MAX_HEADER_BYTES = 100 << 20  # the limit of safetensors itself
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

# What each is called, and who takes it.
_WORDS: dict[str, tuple[str, str]] = {
    "adapter": ("an adapter without its model", "merge it into the model with peft first"),
    "bundle": ("a bundle", "`edgemoe run`, `bench`, `compile` and `verify` take it"),
    "checkpoint": ("a checkpoint", "`edgemoe calibrate`, `apply` and `export` take it"),
    "directory": ("a directory of something else", ""),
    "engine": ("a TensorRT engine", "`edgemoe inspect` takes it"),
    "engine key": ("the key of a TensorRT engine", "`edgemoe inspect` takes it"),
    "gguf": ("a GGUF file", "commands take it where they take a checkpoint"),
    "graph": ("an ONNX graph", "give the bundle that it lies in to `edgemoe run`"),
    "json": ("JSON of another kind", ""),
    "missing": ("nothing: there is no such file", ""),
    "other": ("a file of another kind", ""),
    "pickle": ("a pickle", "save the model as safetensors: pickles run code when opened"),
    "plan": ("a plan", "--plan of `edgemoe apply`, `decompose` and `export` takes it"),
    "report": ("a sweep's report", "`edgemoe inspect` takes it"),
    "special": ("a pipe, a socket or a device", ""),
    "statistics": (
        "statistics",
        "--stats of `edgemoe prune` and `edgemoe decompose` takes them",
    ),
    "task file": ("a task file", "--task NAME=FILE of `edgemoe calibrate` and others takes it"),
    "text": ("a text file", ""),
    "weights": ("a safetensors file of weights", "give the directory that it lies in"),
}


@dataclass(frozen=True)
class FileKind:
    """What a path is.

    Attributes:
        name: Its kind in one word or two.
    """

    name: Name

    @property
    def noun(self) -> str:
        """What a message calls it, such as `a plan`."""
        return _WORDS[self.name][0]

    @property
    def taker(self) -> str:
        """Which command takes it, as a part of a sentence; "" where none does."""
        return _WORDS[self.name][1]


def identify(path: Path) -> FileKind:
    """Tell what a path is.

    Args:
        path: Any path.

    Returns:
        Its kind; a file that cannot be read is another one.
    """
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            return FileKind(_directory(path))
        if not stat.S_ISREG(mode):
            return FileKind("special")
        return FileKind(_file(path))
    except FileNotFoundError:
        return FileKind("missing")
    except OSError:
        return FileKind("other")


def describe_mistake(path: Path) -> str:
    """Say what a path is and who takes it, for the end of a message.

    Args:
        path: What was given in place of something else.

    Returns:
        Such as `a plan (x.json): --plan of ... takes it`, without a full stop.
    """
    kind = identify(path)
    shown = clip(escape_controls(str(path)))
    if kind.name == "missing":
        return f"{shown}, which does not exist"
    return f"{kind.noun} ({shown})" + (f": {kind.taker}" if kind.taker else "")


def _directory(path: Path) -> Name:
    if (path / MANIFEST_FILE).exists():
        return "bundle"
    if (path / "config.json").exists():
        return "checkpoint"
    if (path / "report.json").exists():
        return "report"
    return "adapter" if (path / "adapter_config.json").exists() else "directory"


def _file(path: Path) -> Name:
    with path.open("rb") as opened:
        head = opened.read(_HEAD_BYTES)
    if head[:4] == b"GGUF":
        return "gguf"
    if head[7:9] == b"\0{":
        return _safetensors(path)
    # PyTorch writes an archive; older ones are bare pickles.
    if path.suffix in _PICKLES or head[:2] in (b"\x80\x02", b"\x80\x04", b"\x80\x05"):
        return "pickle"
    if path.suffix == ".engine":
        return "engine"
    if path.suffix == ".onnx":
        return "graph"
    try:
        text = head.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "ignore")
    except UnicodeDecodeError:
        return "other"
    if "\0" in text:
        return "other"
    return _json(text) if text.lstrip()[:1] in ("{", "[") else "text"


def _safetensors(path: Path) -> Name:
    with path.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = opened.read(min(length, _MAX_HEADER_BYTES))
    # The name of the format stands in the header, escaped: JSON within JSON.
    return "statistics" if b"edgemoe.statistics" in header else "weights"


def _json(text: str) -> Name:
    formats: dict[str, Name] = {
        '"edgemoe.plan"': "plan",
        '"edgemoe.sweep"': "report",
        '"edgemoe.engine"': "engine key",
        '"edgemoe.bundle"': "bundle",
    }
    beginning = text[:4096]
    for written, name in formats.items():
        if f'"format": {written}' in beginning or f'"format":{written}' in beginning:
            return name
    first = text.lstrip().split("\n", 1)[0]
    try:
        line = json.loads(first)
    except (ValueError, RecursionError):
        return "json"
    keys = set(line) if isinstance(line, dict) else set()
    return "task file" if keys & {"text", "prompt", "messages"} else "json"
