"""One task's sums, and the passes over data that they come from."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from edgemoe.calibrate.sample import TokenSample
from edgemoe.errors import StatisticsError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgemoe.calibrate.sample import Window
    from edgemoe.calibrate.sums import LayerSums


@dataclass(frozen=True, kw_only=True)
class Source:
    """One calibration pass over (a shard of) one task file.

    Attributes:
        sha256: Hash of the task file.
        lines: Lines that were read at least in part.
        tokens: Tokens that were read.
        shard: `(index, of)`: the pass read every `of`-th line from `index` on.
        sequence_length: Longest window of tokens that the model saw at once.
        max_tokens: How many tokens of the file the pass and its fellow shards were to read;
            None where all.
        sample: What was read.
    """

    sha256: str
    lines: int
    tokens: int
    shard: tuple[int, int] = (0, 1)
    sequence_length: int
    max_tokens: int | None = None
    sample: TokenSample = field(compare=False)

    def header(self) -> dict[str, Any]:
        """Return all but the sample, as JSON values."""
        names = (entry.name for entry in fields(self))
        return {name: getattr(self, name) for name in names if name != "sample"}


@dataclass(frozen=True, kw_only=True, eq=False)
class TaskStatistics:
    """One task's sums.

    Attributes:
        sources: The passes that were added up, sorted.
        layers: Sums by decoder layer index, ascending.
    """

    sources: tuple[Source, ...]
    layers: Mapping[int, LayerSums]

    @property
    def tokens(self) -> int:
        """Tokens that the sums cover."""
        return sum(source.tokens for source in self.sources)

    @property
    def has_tokens(self) -> bool:
        """Whether the calibration's text can be read from the sums' sources."""
        return all(source.sample.has_tokens for source in self.sources)

    @property
    def windows(self) -> list[Window]:
        """The windows of tokens that the sums cover; `StatisticsError` without tokens."""
        if not self.has_tokens:
            raise StatisticsError(
                "statistics must hold the calibration's tokens for a method that runs layers, "
                "got some without (--no-texts, or redacted). Calibrate again without "
                "--no-texts, or choose a method that needs sums only, such as reap."
            )
        return [window for source in self.sources for window in source.sample.windows]

    @property
    def digests(self) -> frozenset[int]:
        """Digests of the lines that the sums cover."""
        return frozenset[int]().union(*(source.sample.digests for source in self.sources))

    def __add__(self, other: TaskStatistics) -> TaskStatistics:
        return TaskStatistics(
            sources=_unite(self.sources + other.sources),
            layers={layer: sums + other.layers[layer] for layer, sums in self.layers.items()},
        )


def _unite(sources: tuple[Source, ...]) -> tuple[Source, ...]:
    """Sort passes, and replace shards that cover a whole file by one pass over it."""
    groups: dict[tuple[Any, ...], list[Source]] = {}
    for source in sources:
        of_one_run = (source.sha256, source.sequence_length, source.max_tokens)
        groups.setdefault(of_one_run, []).append(source)
    united: list[Source] = []
    for group in groups.values():
        # No two shards share a line, so they are all lines where their parts add up to one.
        # Only wholes are replaced: what halves became would depend on the order of merging.
        if sum(Fraction(1, source.shard[1]) for source in group) == 1:
            whole = replace(
                group[0],
                shard=(0, 1),
                lines=sum(source.lines for source in group),
                tokens=sum(source.tokens for source in group),
                sample=TokenSample.union(source.sample for source in group),
            )
            united.append(whole)
        else:
            united.extend(group)
    return tuple(sorted(united, key=_sort_key))


def _sort_key(source: Source) -> tuple[str, int, int, tuple[int, int]]:
    return source.sha256, source.sequence_length, source.max_tokens or 0, source.shard


def refuse_overlap(task: str, first: tuple[Source, ...], second: tuple[Source, ...]) -> None:
    """Refuse to count lines twice.

    Args:
        task: The task's name.
        first: Passes of some statistics.
        second: Passes of others.

    Raises:
        StatisticsError: A line of a file is in both.
    """
    for one in first:
        for other in second:
            (i, n), (j, m) = one.shard, other.shard
            # Lines of residue i modulo n and j modulo m meet exactly where this holds.
            if one.sha256 == other.sha256 and (i - j) % math.gcd(n, m) == 0:
                raise StatisticsError(
                    f"lines must be counted once, got shard {i}/{n} and shard {j}/{m} of one "
                    f"file for task {task!r}. Leave one of the two out."
                )
