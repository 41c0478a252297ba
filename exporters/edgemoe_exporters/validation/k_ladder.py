"""Measure the k ladder of a task: caps of experts per token with their quality and time.

Both are measured offline, so that the runtime never guesses: quality on held-out examples with
the graph that ships, time on the engine of the target where that is available. A cap that loses
more than is allowed ends the ladder; one that another beats in both is left out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from edgemoe.allocate.alloc_l import share_out
from edgemoe.evaluate.drop import paired_drop
from edgemoe.evaluate.evaluation import evaluate
from edgemoe.evaluate.gate import is_within
from edgemoe.evaluate.requests import build_examples
from edgemoe_exporters.validation.margins import (
    RecordingScorer,
    answers_of_choices,
    find_margin,
)
from edgemoe_runtime.adaptive_k.rung_cost import time_rungs
from edgemoe_runtime.bundle.k_ladder import KRung, RungQuality
from edgemoe_runtime.bundle.manifest_file import save_manifest
from edgemoe_runtime.opening import open_task

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from tokenizers import Tokenizer

    from edgemoe.evaluate.evaluation import Evaluation
    from edgemoe.k_policy import KPolicy
    from edgemoe.tasks import TaskFile
    from edgemoe_exporters.validation.graph_calls import Runner
    from edgemoe_exporters.validation.margins import Answers
    from edgemoe_runtime.bundle.manifest import Manifest
    from edgemoe_runtime.bundle.task_entry import TaskEntry

DEFAULT_FLOOR = 0.1
"""Most that the last rung may lose against the first where there is no `--max-drop`."""

_MOST_RUNGS = 8
_RUNG_TOKENS = 2048
_MIN_EXAMPLES = 30


@dataclass(frozen=True)
class LadderTask:
    """The examples that evaluate a task's rungs.

    Attributes:
        held_out: The examples; calibration never saw them.
        tokenizer: The model's.
        max_length: Longest sequence in tokens.
        max_tokens: Most tokens that evaluate an export; a rung is evaluated on 2048 at most, or
            as many more as 30 completions or choices take.
    """

    held_out: TaskFile
    tokenizer: Tokenizer
    max_length: int
    max_tokens: int

    def evaluate(self, runner: Runner, k_cap: Sequence[int]) -> tuple[Evaluation, Answers]:
        """Score a graph under a cap, and return its answers with their margins."""
        scorer = RecordingScorer(runner, k_cap, self.max_length)
        tokens = self.rung_tokens()
        score = evaluate(scorer, self.held_out, self.tokenizer, max_tokens=tokens)
        if self.held_out.kind == "choice":
            return score, answers_of_choices(score)
        examples = build_examples(
            self.held_out, self.tokenizer, max_length=self.max_length, max_tokens=tokens
        )
        return score, scorer.answers(examples)

    def rung_tokens(self) -> int:
        """Return the most tokens that evaluate a rung."""
        tokens = min(self.max_tokens, _RUNG_TOKENS)
        while tokens < self.max_tokens and self.held_out.kind != "text":
            examples = build_examples(
                self.held_out, self.tokenizer, max_length=self.max_length, max_tokens=tokens
            )
            if len(examples) >= min(_MIN_EXAMPLES, len(self.held_out.records)):
                break
            tokens = min(2 * tokens, self.max_tokens)
        return tokens


def list_caps(
    full: Sequence[int], needs: Sequence[Sequence[float]] | None = None
) -> list[tuple[int, ...]]:
    """List the caps to try, the full k first.

    Args:
        full: Most experts per token at full quality, for each MoE layer.
        needs: Perplexity with 1, 2, ... experts in each layer, where `alloc-l` measured it.

    Returns:
        At most eight caps, evenly spread down to 1. With needs they are the tables of
        `alloc-l` for as many budgets. Without, they are uniform, from one below the largest;
        a layer keeps its own k where that is less.
    """
    if needs is not None:
        budgets = np.linspace(sum(full), len(full), _MOST_RUNGS).round().astype(int)
        known = [need[:own] for need, own in zip(needs, full, strict=True)]
        tables = [tuple(share_out(known, int(budget))) for budget in budgets[1:]]
        return list(dict.fromkeys([tuple(full), *tables]))
    highest = max(full, default=1)
    steps = np.linspace(highest, 1, min(highest, _MOST_RUNGS)).round().astype(int)
    return [tuple(full), *(tuple(min(own, int(k)) for own in full) for k in steps[1:])]


def needs_of(policy: KPolicy | None) -> list[tuple[float, ...]] | None:
    """Return the needs of every layer that a k policy measured, if it did.

    Args:
        policy: The policy; None where there is none.

    Returns:
        Perplexity with 1, 2, ... experts, layer by layer.
    """
    found = [] if policy is None else [rule.needs for rule in policy.rules]
    needs = [need for need in found if need is not None]
    return needs if needs and len(needs) == len(found) else None


def measure_rungs(
    runner: Runner,
    task: LadderTask,
    full: Sequence[int],
    floor: float,
    policy: KPolicy | None = None,
    *,
    surely: bool = False,
) -> tuple[KRung, ...]:
    """Measure the quality of rungs, from the full k down to the floor.

    Args:
        runner: The task's graph.
        task: The examples that evaluate it.
        full: Most experts per token at full quality, for each MoE layer.
        floor: Most that a rung may lose against the first: relative for perplexity, in points
            of 1 for accuracy.
        policy: The graph's k policy, if it has one: one of `alloc-l` knows what layers need.
        surely: Whether the upper end of the 95% interval must be above the floor, as for
            `--max-drop`.

    Returns:
        The rungs above the floor, with their quality; the first is the full k.
    """
    needs = needs_of(policy)
    caps = list_caps(full, needs)
    best, expected = task.evaluate(runner, caps[0])
    itself = replace(_quality(best, best), drop=0.0, drop_ci95=(0.0, 0.0))
    rungs = [KRung(name="full", k_cap=caps[0], quality=itself)]
    for cap in caps[1:]:
        score, answers = task.evaluate(runner, cap)
        quality = _quality(best, score)
        if not is_within(quality.drop_ci95[1] if surely else quality.drop, floor):
            break
        margin = find_margin(expected, answers)
        again = float(np.mean(answers.margins <= margin))
        quality = replace(quality, margin=margin, asked_again=again)
        name = f"k{max(cap)}" if needs is None else f"k{np.mean(cap):.2f}"
        rungs.append(KRung(name=name, k_cap=cap, quality=quality))
    return tuple(rungs)


def floor_of(max_drop: float | None, before: Evaluation, after: Evaluation) -> float:
    """Return how much a rung may lose against the first, of what the task may lose in all.

    Args:
        max_drop: Most that the exported task may lose against the checkpoint; None for any.
        before: Score of the checkpoint.
        after: Score of the exported task at the full k.

    Returns:
        The loss, in the units of `max_drop`: relative losses of a perplexity multiply, points
        of an accuracy add up. What the task may have lost already, by the upper end of its
        interval, is gone.
    """
    if max_drop is None:
        return DEFAULT_FLOOR
    lost = paired_drop(before, after).ci95[1]
    return (1 + max_drop) / (1 + lost) - 1 if after.metric == "perplexity" else max_drop - lost


def time_ladders(staged: Path, manifest: Manifest, on_stage: Callable[[str], None]) -> Manifest:
    """Measure the time of every task's rungs on this machine's CPU.

    Args:
        staged: The bundle, whole but for its manifest.
        manifest: The manifest, of target `cpu`, with rungs whose quality was measured.
        on_stage: Called with a short text before each task.

    Returns:
        The manifest with costs, without rungs that another one beats in both.
    """
    save_manifest(manifest, staged)
    tasks: dict[str, TaskEntry] = {}
    for name, entry in manifest.tasks.items():
        tasks[name] = entry
        if entry.k_ladder is None or len(entry.k_ladder) < 2:
            continue
        on_stage(f"time the rungs of {name}")
        # The digests were made of these very files a moment ago.
        opened = open_task(staged, name, verify=False)
        with opened.engine as engine:
            rungs = time_rungs(engine, entry.k_ladder, manifest.model.vocab_size)
        tasks[name] = replace(entry, k_ladder=rungs)
    return replace(manifest, tasks=tasks)


def _quality(full: Evaluation, score: Evaluation) -> RungQuality:
    drop = paired_drop(full, score)
    return RungQuality(
        metric=score.metric,
        value=score.value,
        ci95=score.ci95,
        drop=drop.value,
        drop_ci95=drop.ci95,
        lines=score.n,
    )
