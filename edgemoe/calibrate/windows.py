"""The windows of tokens that a calibration reads: one forward pass each.

Each line is read alone, in windows that do not overlap. What a window adds therefore depends on
nothing but itself, and shards add up to the whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgemoe.calibrate.sample import TokenSample, Window
from edgemoe.calibrate.task_statistics import Source
from edgemoe.data_provenance import digest_line
from edgemoe.errors import TaskFileError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tokenizers import Tokenizer

    from edgemoe.models.contract import MoeModel
    from edgemoe.tasks import TaskFile

SEQUENCE_LENGTH = 512


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Token windows that one calibration reads, by task.

    Attributes:
        by_task: Windows of each task, in order.
        sequence_length: Longest window, in tokens.
        shard: `(index, of)`.
        max_tokens: Tokens to read of each task, over all shards; None reads all.
    """

    by_task: Mapping[str, list[Window]]
    sequence_length: int
    shard: tuple[int, int]
    max_tokens: int | None

    def source(self, task: TaskFile) -> Source:
        """Describe the pass over one task.

        Args:
            task: The task.

        Returns:
            What its statistics say of it.
        """
        windows = self.by_task[task.name]
        return Source(
            sha256=task.sha256,
            lines=len({window.line for window in windows}),
            tokens=sum(len(window.ids) for window in windows),
            shard=self.shard,
            sequence_length=self.sequence_length,
            max_tokens=self.max_tokens,
            sample=TokenSample.of(windows),
        )


def cut_tasks(
    model: MoeModel,
    tasks: Sequence[TaskFile],
    tokenizer: Tokenizer,
    *,
    max_tokens: int | None = None,
    sequence_length: int = SEQUENCE_LENGTH,
    shard: tuple[int, int] = (0, 1),
) -> Windows:
    """Turn task files into windows.

    Args:
        model: The model that will read them.
        tasks: The task files.
        tokenizer: The model's tokenizer.
        max_tokens: Read exactly so many tokens of each task, from its first line on, or all
            where it has fewer; None reads all.
        sequence_length: Longest window that the model sees at once, in tokens.
        shard: `(index, of)`: read every `of`-th line from `index` on, of those that
            `max_tokens` leaves.

    Returns:
        The windows.

    Raises:
        TaskFileError: No task has a token in this shard, or an argument is out of range.
    """
    index, of = shard
    if not 0 <= index < of:
        raise TaskFileError(f"a shard's index must be in [0, {of}), got {index}.")
    for name, value in (("max_tokens", max_tokens), ("sequence_length", sequence_length)):
        if value is not None and value < 1:
            raise TaskFileError(f"{name} must be in [1, inf), got {value}.")
    longest = getattr(model.config, "max_position_embeddings", None) or sequence_length
    sequence_length = min(sequence_length, int(longest))
    windows = {
        task.name: [
            window
            for window in _cut_task(task, tokenizer, max_tokens, sequence_length)
            if (window.line - 1) % of == index
        ]
        for task in tasks
    }
    if not any(windows.values()):
        raise TaskFileError(
            f"shard {index} of {of} must have a token, got none of {len(tasks)} tasks. Use "
            "fewer shards or more lines."
        )
    return Windows(
        by_task=windows,
        sequence_length=sequence_length,
        shard=shard,
        max_tokens=max_tokens,
    )


def _cut_task(
    task: TaskFile, tokenizer: Tokenizer, max_tokens: int | None, sequence_length: int
) -> list[Window]:
    windows: list[Window] = []
    left = max_tokens
    for record in task.records:
        ids = tokenizer.encode(record.calibration_text).ids[:left]
        digest = digest_line(record)
        windows.extend(
            Window(
                line=record.line,
                start=start,
                ids=ids[start : start + sequence_length],
                digest=digest,
            )
            for start in range(0, len(ids), sequence_length)
        )
        if left is not None:
            left -= len(ids)
            if left == 0:
                break
    return windows
