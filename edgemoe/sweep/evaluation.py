"""What judging a compressed model found, and its file."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from edgemoe.evaluate.evaluation import Evaluation, evaluate
from edgemoe.sweep.sizes import Sizes
from edgemoe.sweep.sweep_dir import HELD_OUT, leave
from edgemoe.tasks import TaskFile
from edgemoe_runtime.input_files import parse_strict, read_file

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from tokenizers import Tokenizer

    from edgemoe.evaluate.scorer import Scorer
    from edgemoe.sweep.sweep_dir import SweepDir


@dataclass(frozen=True, kw_only=True)
class CandidateEvaluation:
    """Scores of a plan on its tasks.

    Attributes:
        scores: Scores by task.
        sizes: Of the compressed model.
        seconds: What it took, opening the model not counted.
        recover_seconds: What the recovery before it took; after an interruption, the rest.
    """

    scores: Mapping[str, Evaluation]
    sizes: Sizes
    seconds: float
    recover_seconds: float = 0.0

    def save(self, target: Path) -> None:
        """Write it, whole or not at all.

        Args:
            target: The file.
        """
        leave(target, asdict(self))

    @classmethod
    def load(cls, file: Path, tasks: Sequence[str]) -> CandidateEvaluation:
        """Read what a finished job found.

        Args:
            file: What `save` wrote.
            tasks: The tasks, in the order of the scores.

        Returns:
            The judgement.
        """
        found = parse_strict(read_file(file))
        return cls(
            scores={name: Evaluation.from_json(found["scores"][name]) for name in tasks},
            sizes=Sizes(**found["sizes"]),
            seconds=float(found["seconds"]),
            recover_seconds=float(found["recover_seconds"]),
        )


def judge(
    sweep_dir: SweepDir, scorer: Scorer, tokenizer: Tokenizer
) -> tuple[dict[str, Evaluation], float]:
    """Judge a model on every task.

    Args:
        sweep_dir: The sweep.
        scorer: The model.
        tokenizer: Its tokenizer.

    Returns:
        Scores by task, and the seconds that they took.

    Raises:
        TaskFileError: A line cannot be scored.
        CheckpointError: The model answers NaN or infinity.
    """
    began = time.perf_counter()
    scores = {
        name: evaluate(
            scorer,
            TaskFile.load(name, sweep_dir.lines_file(HELD_OUT, name)),
            tokenizer,
            max_tokens=sweep_dir.held_out_tokens,
        )
        for name in sweep_dir.tasks
    }
    return scores, time.perf_counter() - began
