"""Where a sweep's jobs find what they share, and leave what they finish."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgemoe.parallel.agreement import check_agreement
from edgemoe.staging import staged_file

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from edgemoe.sweep.candidates import Candidate

STATISTICS = "statistics.safetensors"
HELD_OUT = "held-out"
CALIBRATION = "calibration"
_PLANS = "plans"
_SCORES = "scores"
_RECOVERED = "recovered"


@dataclass(frozen=True, kw_only=True)
class SweepDir:
    """Directory and settings that all jobs of a sweep share.

    Attributes:
        model: Checkpoint directory, absolute.
        work: The sweep's work directory, absolute; all workers see it.
        whole: Whether the model is loaded whole.
        tasks: The tasks, which judge in this order.
        held_out_tokens: Tokens of each to judge by.
        threads: CPU threads of a job; None leaves what the worker has.
        versions: What the worker must have too, or its bits may differ.
    """

    model: Path
    work: Path
    whole: bool
    tasks: tuple[str, ...]
    held_out_tokens: int
    threads: int | None
    versions: Mapping[str, str]

    def plan_file(self, candidate: Candidate) -> Path:
        """Return the path of a candidate's plan."""
        return self.work / _PLANS / f"{candidate.key}.json"

    def score_file(self, decision: str) -> Path:
        """Return the path of a decision's evaluation."""
        return self.work / _SCORES / f"{decision}.json"

    def recovered_file(self, key: str) -> Path:
        """Return the path of the evaluation of a recovered decision."""
        return self.work / _RECOVERED / f"{key}.json"

    def lines_file(self, kind: str, task: str) -> Path:
        """Return the path of a task's examples: `HELD_OUT` or `CALIBRATION`."""
        return self.work / kind / f"{task}.jsonl"

    def prepare(self) -> None:
        """Make the folders that jobs write to."""
        for name in (_PLANS, _SCORES, _RECOVERED):
            (self.work / name).mkdir(exist_ok=True)

    def begin(self) -> None:
        """Refuse a machine that would find something else, and set the threads.

        Raises:
            SpreadError: This machine does not see the files, or has other versions.
        """
        import torch

        check_agreement({"checkpoint": self.model, "work directory": self.work}, self.versions)
        if self.threads is not None:
            torch.set_num_threads(self.threads)


def leave(target: Path, content: Mapping[str, Any]) -> None:
    """Write a finished job's file, whole or not at all.

    Args:
        target: The file.
        content: JSON values.
    """
    with staged_file(target, force=True) as staged:
        staged.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
