"""Damage a file, run the commands that read it, and judge what they say.

Each case is a fork of this process, which has imported torch but no engine (onnxruntime starts
a thread, and locks of threads do not survive a fork): a crash or a hang of one is counted, and
the others go on.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.fuzz.formats import Format

LONGEST_MESSAGE = 1000  # characters
_MOST_SECONDS = 60
# edgemoe's own mark of a defect, and what a traceback begins with.
_DEFECT = re.compile(r"unexpected \w+:|^Traceback ", re.MULTILINE)
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


@dataclass(frozen=True, kw_only=True)
class Case:
    """What the commands made of one damaged file.

    Attributes:
        format: Of the file.
        seed: Names the damage.
        refused: Whether a command refused it.
        message: The longest message, in characters.
        faults: What no command may do, in words; empty where all is well.
    """

    format: str
    seed: int
    refused: bool
    message: int
    faults: tuple[str, ...]


def import_first() -> None:
    """Import once what every fork would import."""
    import torch

    torch.set_num_threads(1)
    for module in ("edgemoe.cli", "transformers", "edgemoe.apply.streamed", "edgemoe.models"):
        importlib.import_module(module)


def check_undamaged(form: Format, base: Path) -> None:
    """Run the commands of a format on good files: what refuses those finds nothing.

    Args:
        form: The format.
        base: Good files, which are not changed.

    Raises:
        RuntimeError: A command refuses them.
    """
    with _copied(form, base, (base / form.file).read_bytes()) as folder:
        for command in form.commands:
            words = command.format(base=folder, out=folder / "out").split()
            status, message = _in_fork(words, folder)
            if status:
                raise RuntimeError(f"edgemoe {command} refuses good files: {message}")
            if (folder / "out").exists():
                _remove(folder / "out")


def run_case(form: Format, seed: int, base: Path) -> Case:
    """Damage a file and run its commands.

    Args:
        form: The format.
        seed: Names the damage.
        base: Good files, which are not changed.

    Returns:
        What the commands made of it.
    """
    draw = random.Random(f"{form.name} {seed}")
    content = (base / form.file).read_bytes()
    changed = draw.choice(list(form.mutations))(content, draw)
    faults: list[str] = []
    refused, longest = False, 0
    with _copied(form, base, changed) as folder:
        for command in form.commands:
            out = folder / "out"
            words = command.format(base=folder, out=out).split()
            status, message = _in_fork(words, folder)
            longest = max(longest, len(message.replace(str(folder), "")))
            refused |= status != 0
            faults += [f"{words[0]}: {fault}" for fault in _judge(status, message)]
            left = [
                path.name for path in folder.iterdir() if path.name.startswith((".", "out"))
            ]
            if status and left:
                faults.append(f"{words[0]}: left {', '.join(left)}")
            for path in left:
                _remove(folder / path)
    return Case(
        format=form.name, seed=seed, refused=refused, message=longest, faults=tuple(faults)
    )


def _judge(status: int, message: str) -> Iterator[str]:
    if status not in (0, 1, 2):
        yield f"ended with {status}: {message[-120:]!r}"
    if _DEFECT.search(message):
        yield message[:200]
    if status and not message.strip():
        yield "failed without a word"
    if status and len(message) > LONGEST_MESSAGE:
        yield f"a message of {len(message)} characters: {message[:80]!r}"
    if _CONTROLS.search(message):
        yield f"control characters in {message[:80]!r}"


@contextlib.contextmanager
def _copied(form: Format, base: Path, changed: bytes) -> Iterator[Path]:
    """Yield a copy of the base directory, with the one file changed."""
    with tempfile.TemporaryDirectory(prefix="edgemoe-fuzz-") as name:
        folder = Path(name) / "base"
        shutil.copytree(base, folder)
        file = folder / form.file
        file.write_bytes(changed)
        if form.sealed is not None:
            _seal(folder / form.sealed, file)
        yield folder


def _seal(bundle: Path, file: Path) -> None:
    """Tell a bundle's manifest of a changed file."""
    manifest = bundle / "manifest.json"
    content = json.loads(manifest.read_bytes())
    data = file.read_bytes()
    entry = content["files"][file.relative_to(bundle).as_posix()]
    entry.update(sha256=hashlib.sha256(data).hexdigest(), size=len(data))
    manifest.unlink()
    manifest.write_text(json.dumps(content), encoding="utf-8")


def _in_fork(words: list[str], folder: Path) -> tuple[int, str]:
    """Run a command in a fork; return its status (negative: the signal) and its stderr."""
    told = folder / "stderr"
    child = os.fork()
    if child == 0:
        _run(words, told)
    end = time.monotonic() + _MOST_SECONDS
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return -signal.SIGALRM, f"did not end within {_MOST_SECONDS} s"
        time.sleep(0.005)
    message = told.read_text(encoding="utf-8", errors="replace")
    told.unlink()
    return os.waitstatus_to_exitcode(status), message


def _run(words: list[str], told: Path) -> None:
    """Run a command in this process, which ends with it."""
    status = 70
    try:
        descriptor = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(descriptor, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        from edgemoe.cli import main

        main(words)
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 1
    except BaseException as error:  # reported as what no command may raise
        sys.stderr.write(f"Traceback of {type(error).__name__}: {error}")
    finally:
        sys.stderr.flush()
        os._exit(status)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
