"""Compare a written graph with the eager model it was made from.

The graph runs in onnxruntime on the CPU, from its files, as it will be shipped: prefill,
steps of one token and of several with the cache, batches of one and two rows. The eager model
sees each whole row at once, so a wrong cache, mask or position shows as a difference.

What is allowed:

- fp32: largest absolute difference of a logit at most 1e-4, times the largest logit where
  that is above 1 (both sides round; logits of language models reach 20 to 40).
- fp16, int8, int4: weights differ, so logits do; the mean Kullback-Leibler divergence of the
  next-token distributions, eager to graph, must be below ``MAX_MEAN_KL``. That bound tells a
  broken graph (measured: 5 and more) from a quantised one; what quantisation costs the task
  is judged by its score (``--max-drop``).

An expert is chosen by comparing router scores, so where two are equal up to rounding, two
engines may choose differently and both be right. A row is compared in fp32 up to the first
such token; routers stay in float32 in every graph, which keeps them rare.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
import torch

from edgemoe.errors import ExportError, ParityError
from edgemoe.models.hooks import observe
from edgemoe.models.routers import is_near_tie
from edgemoe.progress import track
from edgemoe_runtime.backends.onnxruntime import MINIMUM_VERSION
from edgemoe_runtime.manifest_parts import ParityReport

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from edgemoe.evaluate.scorer import Logprobs, Request
    from edgemoe.models.contract import MoeModel
    from edgemoe.models.layer import MoeLayer
    from edgemoe.models.routers import Routing

MAX_FP32_DIFFERENCE = 1e-4
MAX_MEAN_KL = {"fp32": 0.01, "fp16": 0.05, "int8": 0.3, "int4": 2.0}  # nats

_ROW_TOKENS = 24
# Batch and lengths of successive calls; their sums are at most _ROW_TOKENS. GroupQueryAttention
# continues a batch by one token at a time only.
_SCHEDULES = ((1, (16, 1, 1, 1, 1)), (1, (5, 4, 3)), (2, (7, 1, 1)))


@dataclass(frozen=True)
class EagerRun:
    """What the eager model says of one batch of rows.

    Attributes:
        ids: Token ids, int64 ``[batch, tokens]``.
        steps: Lengths of the calls in which the graph gets them; their sum is ``tokens``.
        logits: float32 ``[batch, tokens, vocabulary]``.
        decided: bool ``[batch, tokens]``: no router was near a tie up to this token.
    """

    ids: np.ndarray[Any, np.dtype[np.int64]]
    steps: tuple[int, ...]
    logits: np.ndarray[Any, np.dtype[np.float32]]
    decided: np.ndarray[Any, np.dtype[np.bool_]]


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How far a graph is from eager.

    Attributes:
        max_abs_logit_difference: Largest absolute difference of any logit of a token whose
            experts are decided.
        max_abs_logit: Largest absolute logit of the eager model.
        mean_kl: Mean divergence of the next-token distributions, eager to graph, in nats.
        top1_agreement: Fraction of positions with the same most likely token, in [0, 1].
        tokens: Positions compared.
        near_ties: Positions behind a near tie; they count in the means only.
    """

    max_abs_logit_difference: float
    max_abs_logit: float
    mean_kl: float
    top1_agreement: float
    tokens: int
    near_ties: int = 0

    def to_report(self) -> ParityReport:
        """Return what the manifest records."""
        return ParityReport(
            max_abs_logit_difference=self.max_abs_logit_difference,
            tokens=self.tokens,
            reference=(
                f"eager float32 (largest logit {self.max_abs_logit:.1f}); mean KL "
                f"{self.mean_kl:.3g} nats, same best token at {self.top1_agreement:.1%}; "
                f"{self.near_ties} of the tokens follow a near tie of two experts"
            ),
        )


class GraphRunner:
    """A written graph in onnxruntime on the CPU, with its cache.

    Args:
        path: The graph; its weights lie beside it.
        threads: Threads to compute with; onnxruntime's choice by default.

    Attributes:
        state: Tokens seen and the cache, by input; may be kept and put back.

    Raises:
        ExportError: onnxruntime cannot open the graph.
    """

    def __init__(self, path: Path, threads: int | None = None) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = (
            3  # errors only: warnings tell of fusions that do not apply
        )
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            self._session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's exceptions have no common base
            raise ExportError(
                f"onnxruntime {onnxruntime.__version__} must open the graph, got: "
                f"{error}. Install a tested version, or report it with the model's name."
            ) from error
        self._name = path.name
        self._outputs = [output.name for output in self._session.get_outputs()]
        self.state: tuple[int, dict[str, np.ndarray[Any, Any]]] = (0, {})
        self._k_cap: np.ndarray[Any, Any] | None = None

    def start(self, batch: int, k_cap: Sequence[int]) -> None:
        """Forget what was seen.

        Args:
            batch: Rows of the following calls.
            k_cap: Most experts per token, for each MoE layer.
        """
        self._k_cap = np.asarray(k_cap, dtype=np.int64)
        past = {
            spec.name: np.zeros((batch, spec.shape[1], 0, spec.shape[3]), _NUMPY[spec.type])
            for spec in self._session.get_inputs()
            if spec.name.startswith("past_key_values.")
        }
        self.state = (0, past)

    def run(
        self, ids: np.ndarray[Any, np.dtype[np.int64]]
    ) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Continue the rows.

        Args:
            ids: Next tokens, int64 ``[batch, tokens]``.

        Returns:
            Logits, float32 ``[batch, tokens, vocabulary]``.

        Raises:
            ExportError: onnxruntime cannot run the graph.
        """
        seen, past = self.state
        batch, total = len(ids), seen + ids.shape[1]
        feeds = {
            "input_ids": ids,
            "attention_mask": np.ones((batch, total), np.int64),
            "position_ids": np.tile(np.arange(seen, total), (batch, 1)),
            **past,
        }
        if self._k_cap is not None and self._k_cap.size:
            feeds["k_cap"] = self._k_cap
        try:
            results = dict(zip(self._outputs, self._session.run(None, feeds), strict=True))
        except Exception as error:  # onnxruntime's exceptions have no common base
            raise ExportError(
                f"onnxruntime {onnxruntime.__version__} must run {self._name}, got: {error}. "
                "Install a tested version, or report it with the model's name."
            ) from error
        present = {
            name: results[name.replace("past_key_values.", "present.", 1)] for name in past
        }
        self.state = (total, present)
        logits: np.ndarray[Any, np.dtype[np.float32]] = results["logits"].astype(np.float32)
        return logits


_NUMPY = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
}


class GraphScorer:
    """Log-probabilities by a written graph, as :class:`edgemoe.evaluate.scorer.Scorer`.

    Args:
        runner: The graph.
        k_cap: Most experts per token, for each MoE layer.
        max_length: Longest sequence in tokens.
    """

    def __init__(self, runner: GraphRunner, k_cap: Sequence[int], max_length: int) -> None:
        self._runner = runner
        self._k_cap = tuple(k_cap)
        self._max_length = max_length

    @property
    def max_length(self) -> int:
        """Most tokens that a context and a continuation may have together."""
        return self._max_length

    def score(self, requests: Sequence[Request]) -> list[list[Logprobs]]:
        """Score every continuation of every request; a context is read once.

        Args:
            requests: What to score.

        Returns:
            For each request and each of its continuations log p(token | all before it), in
            nats, float64 ``[tokens of the continuation]``.
        """
        return [self._score(request) for request in track(requests, "evaluate the graph")]

    def _score(self, request: Request) -> list[Logprobs]:
        self._runner.start(1, self._k_cap)
        cut = len(request.context) - 1
        if cut and len(request.continuations) > 1:
            self._runner.run(np.array([request.context[:cut]], np.int64))
            skipped = 0
        else:
            skipped, cut = cut, 0
        state = self._runner.state
        answers = []
        for continuation in request.continuations:
            self._runner.state = state
            ids = np.array([*request.context[cut:], *continuation], np.int64)
            logits = self._runner.run(ids[None, :-1])[0, skipped:]
            answers.append(_pick(logits, np.array(continuation)))
        return answers


def check_engine(flavour: str) -> None:
    """Refuse to make a graph that the installed onnxruntime would compute wrongly.

    Args:
        flavour: ``ort`` or ``tensorrt``; only the former has fused experts.

    Raises:
        ExportError: onnxruntime is too old.
    """
    version = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2])
    if flavour == "ort" and version < MINIMUM_VERSION:
        needed = ".".join(map(str, MINIMUM_VERSION))
        raise ExportError(
            f"targets cpu and cuda need onnxruntime {needed} or later, got "
            f"{onnxruntime.__version__}, which computes fused experts wrongly. Update it "
            "(Python 3.10 gets no later one: use 3.11 or later), or choose a TensorRT target."
        )


def run_eager(model: MoeModel, ids: Sequence[int]) -> list[EagerRun]:
    """Ask the eager model about rows of real tokens.

    Args:
        model: The model, in float32.
        ids: Tokens of some text; repeated where they are few.

    Returns:
        Its logits for each schedule of calls.
    """
    needed = sum(batch * _ROW_TOKENS for batch, _ in _SCHEDULES)
    tokens = np.resize(np.asarray(ids, dtype=np.int64), needed).reshape(-1, _ROW_TOKENS)
    runs, used = [], 0
    for batch, steps in _SCHEDULES:
        rows = np.ascontiguousarray(tokens[used : used + batch, : sum(steps)])
        used += batch
        tied = torch.zeros(rows.size, dtype=torch.bool)

        def note_ties(
            layer: MoeLayer,
            _: torch.Tensor,
            routing: Routing,
            __: object,
            tied: torch.Tensor = tied,
        ) -> None:
            if layer.rule is not None:
                tied |= is_near_tie(
                    routing.logits, layer.correction_bias, layer.rule, layer.top_k
                )

        with torch.no_grad(), observe(model, note_ties):
            logits = model.model(input_ids=torch.from_numpy(rows), use_cache=False).logits
        decided = ~np.logical_or.accumulate(tied.numpy().reshape(rows.shape), axis=1)
        runs.append(EagerRun(rows, steps, logits.float().numpy(), decided))
    return runs


def measure_parity(
    runner: GraphRunner, runs: Sequence[EagerRun], k_cap: Sequence[int]
) -> Parity:
    """Run a graph on the rows that the eager model saw, and compare.

    Args:
        runner: The graph.
        runs: What the eager model said.
        k_cap: Full k of each MoE layer.

    Returns:
        The differences; not a number where the graph gave one.
    """
    differences, finite, divergences, agreements, largest = [], [], [], [], 0.0
    # Where every token is behind a tie, all count: a comparison of nothing would pass.
    all_count = not any(run.decided.any() for run in runs)
    for run in runs:
        runner.start(len(run.ids), k_cap)
        cuts = np.cumsum(run.steps)[:-1]
        graph = np.concatenate(
            [
                runner.run(np.ascontiguousarray(part))
                for part in np.split(run.ids, cuts, axis=1)
            ],
            axis=1,
        )
        difference = np.abs(graph - run.logits).max(axis=-1)
        differences.append(difference.max(where=run.decided | all_count, initial=0.0))
        finite.append(np.isfinite(graph).all())
        largest = max(largest, float(np.abs(run.logits).max()))
        log_eager, log_graph = _log_softmax(run.logits), _log_softmax(graph)
        divergences.append((np.exp(log_eager) * (log_eager - log_graph)).sum(-1).ravel())
        agreements.append((graph.argmax(-1) == run.logits.argmax(-1)).ravel())
    return Parity(
        max_abs_logit_difference=float(np.max(differences)) if all(finite) else float("nan"),
        max_abs_logit=largest,
        mean_kl=float(np.concatenate(divergences).mean()),
        top1_agreement=float(np.concatenate(agreements).mean()),
        tokens=sum(run.ids.size for run in runs),
        near_ties=sum(int((~run.decided).sum()) for run in runs),
    )


def check_parity(parity: Parity, precision: str, task: str) -> None:
    """Refuse a graph that is further from eager than its precision explains.

    Args:
        parity: What was measured.
        precision: Of the graph.
        task: Whose graph it is.

    Raises:
        ParityError: It is too far.
    """
    limits = [("mean KL divergence in nats", parity.mean_kl, MAX_MEAN_KL[precision])]
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


def _pick(
    logits: np.ndarray[Any, np.dtype[np.float32]], ids: np.ndarray[Any, np.dtype[np.int64]]
) -> Logprobs:
    """Return log p of one token per row; logits [rows, vocabulary], ids [rows]."""
    largest = logits.max(-1)
    total = np.exp(logits - largest[:, None]).sum(-1, dtype=np.float64)
    picked = logits[np.arange(len(ids)), ids].astype(np.float64)
    result: Logprobs = picked - largest - np.log(total)
    return result


def _log_softmax(
    logits: np.ndarray[Any, np.dtype[np.float32]],
) -> np.ndarray[Any, np.dtype[np.float64]]:
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    result: np.ndarray[Any, np.dtype[np.float64]] = wide - np.log(
        np.exp(wide).sum(-1, keepdims=True)
    )
    return result
