"""Several tasks as one, each with its share.

What calibration reads decides what survives: on web text alone, code and dialogue go first. So
a plan may be made for a mixture. Tasks are measured once and mixed when experts are chosen: a
task's sums are divided by its tokens and multiplied by its share, as if so many of the
mixture's tokens had been its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgemoe.calibrate.sample import Window
from edgemoe.calibrate.sums import SUM_NAMES, LayerSums
from edgemoe.calibrate.task_statistics import TaskStatistics
from edgemoe.errors import StatisticsError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edgemoe.calibrate.statistics import Statistics


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Statistics of one or several tasks, as methods read them.

    Attributes:
        measured: Sums over the mixture.
        digests: Of the lines that the tasks' sums cover.
        tasks: What is mixed, and how many tokens of each stand for its share.
    """

    measured: TaskStatistics
    digests: frozenset[int]
    tasks: Sequence[tuple[TaskStatistics, int]]

    @property
    def windows(self) -> list[Window]:
        """Tokens of all its tasks; `StatisticsError` where a task has none."""
        return [
            window
            for task, tokens in self.tasks
            for window in spread_windows(task.windows, tokens)
        ]


def mix(statistics: Statistics, weights: Mapping[str, float]) -> Mixture:
    """Mix tasks.

    Args:
        statistics: Sums of the checkpoint.
        weights: Weight of each task, in (0, inf); only ratios count.

    Returns:
        The mixture; of one task it is that task's sums, bit for bit.

    Raises:
        StatisticsError: A task was not calibrated, or on no token, or a weight is out of range.
    """
    tasks = {name: statistics.task(name) for name in weights}
    for name, weight in weights.items():
        if not (math.isfinite(weight) and weight > 0):
            raise StatisticsError(
                f"a task's weight must be in (0, inf), got {weight:g} for {name!r}."
            )
        if tasks[name].tokens == 0:
            raise StatisticsError(
                f"statistics must cover a token of the task, got none of {name!r}. Merge the "
                "other shards in first."
            )
    digests = frozenset[int]().union(*(task.digests for task in tasks.values()))
    if len(tasks) == 1:
        (only,) = tasks.values()
        return Mixture(measured=only, digests=digests, tasks=[(only, only.tokens)])
    total = math.fsum(weights.values())
    shares = {name: weight / total for name, weight in weights.items()}
    tokens = sum(task.tokens for task in tasks.values())
    scales = {name: shares[name] * tokens / task.tokens for name, task in tasks.items()}
    layers = {
        layer.layer: _add([(scales[n], task.layers[layer.layer]) for n, task in tasks.items()])
        for layer in statistics.shape.layers
    }
    # As many tokens as the scarcest task allows at its share.
    most = min(task.tokens / shares[name] for name, task in tasks.items())
    parts = [(task, max(1, round(shares[name] * most))) for name, task in tasks.items()]
    sources = tuple(source for task in tasks.values() for source in task.sources)
    measured = TaskStatistics(sources=sources, layers=layers)
    return Mixture(measured=measured, digests=digests, tasks=parts)


def spread_windows(windows: Sequence[Window], tokens: int) -> list[Window]:
    """Choose windows from all over a sample.

    Args:
        windows: The sample.
        tokens: How many tokens to choose, in [1, inf).

    Returns:
        Windows in their order, the last chosen one cut short; all where there are not more.
    """
    if sum(len(window.ids) for window in windows) <= tokens:
        return list(windows)
    # Bit-reversed order visits a range from all over: 0, 1/2, 1/4, 3/4, ...
    bits = max(1, (len(windows) - 1).bit_length())
    order = sorted(range(len(windows)), key=lambda n: int(f"{n:0{bits}b}"[::-1], 2))
    chosen: dict[int, Window] = {}
    left = tokens
    for position in order:
        window = windows[position]
        ids = window.ids[:left]
        chosen[position] = Window(
            line=window.line, start=window.start, ids=ids, digest=window.digest
        )
        left -= len(ids)
        if left == 0:
            break
    return [chosen[position] for position in sorted(chosen)]


def _add(parts: Sequence[tuple[float, LayerSums]]) -> LayerSums:
    sums = {
        name: sum(scale * getattr(part, name) for scale, part in parts) for name in SUM_NAMES
    }
    return LayerSums(**sums, remainders={})
