"""Run edgemoe's commands once each, and remember what they answered, took and needed.

What a benchmark here compares is made by the commands that users run. A finished command is
not run again, so a benchmark that is interrupted goes on where it was.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import click
import torch

from edgemoe.evaluate.evaluation import Evaluation, evaluate
from edgemoe.evaluate.subject import open_subject
from edgemoe.staging import staged_file
from edgemoe.tasks import TaskFile

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class Done:
    """What a command came to.

    Attributes:
        answer: What it printed with `--json`.
        wall_seconds: From start to end.
        cpu_seconds: Processor time, of its own processes too.
        peak_bytes: Largest resident set of it, or of one of its processes.
    """

    answer: dict[str, Any]
    wall_seconds: float
    cpu_seconds: float
    peak_bytes: int


class Commands:
    """Commands of one benchmark, and their outputs in one directory."""

    def __init__(self, work: Path, threads: int) -> None:
        """Use a directory.

        Args:
            work: Where outputs and answers are kept.
            threads: CPU threads of each command.
        """
        self.work = work
        self._threads = threads
        self._answers = work / "answers"
        self._answers.mkdir(parents=True, exist_ok=True)
        torch.set_num_threads(threads)

    def run(self, name: str, *arguments: object) -> Done:
        """Run a command, or tell what it came to when it ran.

        Args:
            name: What to remember it by.
            arguments: After `edgemoe`; `--json` is added.

        Returns:
            What it came to.

        Raises:
            ClickException: The command failed.
        """
        words = [str(argument) for argument in arguments]
        file = self._answers / f"{name}.json"
        if file.exists():
            found = json.loads(file.read_text(encoding="utf-8"))
            if found.pop("arguments") == words:
                return Done(**found)
            raise click.ClickException(
                f"{file} must be of the same command, got one of other arguments. Remove "
                f"{self.work}, or give another directory."
            )
        click.echo(f"edgemoe {' '.join(words)}", err=True)
        command = [sys.executable, "-m", "edgemoe.cli", *words, "--json"]
        if (self.work / name).exists():
            command.append("--force")
        variables = {**os.environ, "OMP_NUM_THREADS": str(self._threads)}
        began = time.perf_counter()
        with tempfile.TemporaryFile() as told, tempfile.TemporaryFile() as warned:
            child = subprocess.Popen(command, stdout=told, stderr=warned, env=variables)
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
            wall = time.perf_counter() - began
            told.seek(0)
            warned.seek(0)
            if child.returncode:
                raise click.ClickException(warned.read().decode())
            done = Done(
                answer=json.loads(told.read()),
                wall_seconds=wall,
                cpu_seconds=usage.ru_utime + usage.ru_stime,
                peak_bytes=usage.ru_maxrss * 1024,
            )
        self._keep(file, {"arguments": words, **asdict(done)})
        return done

    def make(self, name: str, *arguments: object) -> Done:
        """Run a command that writes an output of that name in the work directory.

        Args:
            name: What its output is called.
            arguments: After `edgemoe`; `-o` is added, and `--force` where a command that
                was killed left something.

        Returns:
            What it came to.
        """
        return self.run(name, *arguments, "-o", self.work / name)

    def calibrate(self, model: Path, task: str, lines: Path, tokens: int) -> Path:
        """Collect statistics of one task, in `stats.safetensors` of the work directory.

        Args:
            model: The checkpoint.
            task: Name of the task.
            lines: Its task file.
            tokens: Of it, at most.

        Returns:
            The statistics.
        """
        name = "stats.safetensors"
        given = ("--task", f"{task}={lines}", "--max-tokens", tokens)
        self.make(name, "calibrate", model, *given)
        return self.work / name

    def judge(self, name: str, checkpoint: Path, lines: Path, tokens: int) -> Evaluation:
        """Judge a checkpoint, or tell how it was judged.

        Args:
            name: What to remember it by.
            checkpoint: The checkpoint.
            lines: Task file that judges.
            tokens: Of it, at most.

        Returns:
            The score, with that of each line.
        """
        file = self._answers / f"score-{name}.json"
        if not file.exists():
            click.echo(f"judge {checkpoint} on {lines.name}", err=True)
            task = TaskFile.load(lines.name.partition(".")[0], lines)
            with open_subject(checkpoint, task=task.name, k_cap=None) as subject:
                score = evaluate(subject.scorer, task, subject.tokenizer, max_tokens=tokens)
            self._keep(file, asdict(score))
        found = json.loads(file.read_text(encoding="utf-8"))
        return Evaluation.from_json(found)

    def _keep(self, file: Path, content: dict[str, Any]) -> None:
        with staged_file(file, force=True) as staged:
            staged.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
