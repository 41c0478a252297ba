"""Compare a written graph with the eager model it was made from.

The graph runs in onnxruntime on the CPU, from its files, as it will be shipped: prefill,
steps of one token and of several with the cache, batches of one and two rows. The eager model
sees each whole row at once, so a wrong cache, mask or position shows as a difference.

What is allowed:

- fp32: largest absolute difference of a logit at most 1e-4, times the largest logit where
  that is above 1 (both sides round; logits of language models reach 20 to 40).
- fp16, int8, int4: weights differ, so logits do; the mean Kullback-Leibler divergence of the
  next-token distributions, eager to graph, must be below `MAX_MEAN_KL`. That bound separates a
  broken graph (measured: 5 and more) from a quantised one; what quantisation costs the task
  is measured by its score (`--max-drop`).

An expert is chosen by comparing router scores, so where two are equal up to rounding, two
engines may choose differently and both be right. A row is compared in fp32 up to the first
such token; routers stay in float32 in every graph, which keeps them rare. Gates of
SparseMixer (PhiMoE) jump by half where two logits are near each other or a band's edge: tokens
from the first on that float16's rounding may put on the other side do not count for the mean,
as long as a quarter of the tokens is left.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgemoe.errors import ParityError
from edgemoe_exporters.validation.graph_calls import Call
from edgemoe_runtime.bundle.task_entry import ParityReport

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgemoe_exporters.sources.eager_run import EagerRun
    from edgemoe_exporters.validation.graph_calls import Runner

MAX_FP32_DIFFERENCE = 1e-4
MAX_MEAN_KL = {"fp32": 0.01, "fp16": 0.05, "int8": 0.3, "int4": 2.0}  # nats


@dataclass(frozen=True, kw_only=True)
class Parity:
    """Differences between a graph and the eager model.

    Attributes:
        max_abs_logit_difference: Largest absolute difference of any logit of a token whose
            experts are decided.
        max_abs_logit: Largest absolute logit of the eager model.
        mean_kl: Mean divergence of the next-token distributions, eager to graph, in nats.
        steady_kl: The same over tokens up to the first whose gates may jump; what is judged.
        top1_agreement: Fraction of positions with the same most likely token, in [0, 1].
        tokens: Positions compared.
        near_ties: Positions behind a near tie; they count in the means only.
        slices: Parts of the graph that ran one after the other; 1 where it ran as a whole.
    """

    max_abs_logit_difference: float
    max_abs_logit: float
    mean_kl: float
    steady_kl: float
    top1_agreement: float
    tokens: int
    near_ties: int = 0
    slices: int = 1

    def to_report(self) -> ParityReport:
        """Return its entry in the manifest."""
        way = f"; the graph ran in {self.slices} slices" if self.slices > 1 else ""
        return ParityReport(
            max_abs_logit_difference=self.max_abs_logit_difference,
            tokens=self.tokens,
            reference=(
                f"eager float32 (largest logit {self.max_abs_logit:.1f}); mean KL "
                f"{self.mean_kl:.3g} nats, same best token at {self.top1_agreement:.1%}; "
                f"{self.near_ties} of the tokens follow a near tie of two experts{way}"
            ),
        )


def measure_parity(runner: Runner, runs: Sequence[EagerRun], k_cap: Sequence[int]) -> Parity:
    """Run a graph on the rows that the eager model saw, and compare.

    Args:
        runner: The graph.
        runs: The eager model's logits.
        k_cap: Full k of each MoE layer.

    Returns:
        The differences; not a number where the graph gave one.
    """
    calls: list[Call] = []
    owners: list[int] = []
    for number, run in enumerate(runs):
        parts = np.split(run.ids, np.cumsum(run.steps)[:-1], axis=1)
        for step, part in enumerate(parts):
            before = len(calls) - 1 if step else None
            calls.append(Call(np.ascontiguousarray(part), before))
            owners.append(number)
    answers: list[list[np.ndarray[Any, np.dtype[np.float32]]]] = [[] for _ in runs]
    runner.run_calls(
        calls, k_cap, lambda number, logits: answers[owners[number]].append(logits)
    )
    differences, finite, divergences, agreements, largest = [], [], [], [], 0.0
    # Where every token is behind a tie, all count: a comparison of nothing would pass.
    all_count = not any(run.decided.any() for run in runs)
    for run, parts in zip(runs, answers, strict=True):
        graph = np.concatenate(parts, axis=1)
        difference = np.abs(graph - run.logits).max(axis=-1)
        differences.append(difference.max(where=run.decided | all_count, initial=0.0))
        finite.append(np.isfinite(graph).all())
        largest = max(largest, float(np.abs(run.logits).max()))
        log_eager, log_graph = log_softmax(run.logits), log_softmax(graph)
        divergences.append((np.exp(log_eager) * (log_eager - log_graph)).sum(-1).ravel())
        agreements.append((graph.argmax(-1) == run.logits.argmax(-1)).ravel())
    diverging = np.concatenate(divergences)
    steady = np.concatenate([run.steady.ravel() for run in runs])
    if 4 * steady.sum() < steady.size:
        steady = np.ones_like(steady)
    return Parity(
        max_abs_logit_difference=float(np.max(differences)) if all(finite) else float("nan"),
        max_abs_logit=largest,
        mean_kl=float(diverging.mean()),
        steady_kl=float(diverging[steady].mean()),
        top1_agreement=float(np.concatenate(agreements).mean()),
        tokens=sum(run.ids.size for run in runs),
        near_ties=sum(int((~run.decided).sum()) for run in runs),
        slices=runner.slice_count,
    )


def check_parity(parity: Parity, precision: str, task: str) -> None:
    """Check that a graph is as close to eager as its precision allows.

    Args:
        parity: The measured differences.
        precision: The graph's.
        task: The graph's task.

    Raises:
        ParityError: It is too far.
    """
    limits = [("mean KL divergence in nats", parity.steady_kl, MAX_MEAN_KL[precision])]
    if precision == "fp32":
        largest = MAX_FP32_DIFFERENCE * max(1.0, parity.max_abs_logit)
        limits.insert(0, ("largest logit difference", parity.max_abs_logit_difference, largest))
    for unit, value, limit in limits:
        if not value <= limit:  # also true where the value is not a number
            raise ParityError(
                f"graph of task {task} in {precision} must agree with the eager model: {unit} "
                f"must be at most {limit:.2g}, got {value:.3g} over {parity.tokens} tokens. "
                "Nothing was written. Try another --precision, and please report it with the "
                "model's name."
            )


def log_softmax(
    logits: np.ndarray[Any, np.dtype[np.float32]],
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return log-probabilities over the last axis, float64, of float32 logits."""
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    result: np.ndarray[Any, np.dtype[np.float64]] = wide - np.log(
        np.exp(wide).sum(-1, keepdims=True)
    )
    return result
