"""How often a written graph's best token is that of the checkpoint before any change.

Parity compares a graph with the eager model that has the same weights, and so says whether the
graph is right. A user asks another question: how much of what the checkpoint says does the
bundle still say, pruned, recovered and quantised. It is answered on the task's held-out text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from edgemoe.layerwise.batch import Batch
from edgemoe.layerwise.runner import LayerTask, run_layers
from edgemoe_exporters.validation.graph_calls import Call
from edgemoe_exporters.validation.parity import log_softmax
from edgemoe_exporters.validation.parity_text import sample_tokens

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from tokenizers import Tokenizer

    from edgemoe.layerwise.provider import LayerProvider
    from edgemoe.resume import WorkDirectory
    from edgemoe.tasks import TaskFile
    from edgemoe_exporters.validation.graph_calls import Runner
    from edgemoe_exporters.validation.parity import Parity

_POSITIONS = 512
_ROW_TOKENS = 64
# Logits of all positions are in memory: 128 MiB of float32.
_MOST_LOGITS = 1 << 25


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How much of what a checkpoint says a graph says, too.

    Attributes:
        same_token_share: Share of positions with the same most likely token, in [0, 1].
        kl_nats: Mean divergence of the next-token distributions, checkpoint to graph, in nats.
        positions: Positions compared.
    """

    same_token_share: float
    kl_nats: float
    positions: int

    @classmethod
    def of_parity(cls, parity: Parity) -> Agreement:
        """Take over a comparison with the checkpoint itself, of a graph with all its weights.

        Args:
            parity: The comparison.

        Returns:
            The same, as an agreement.
        """
        return cls(
            same_token_share=parity.top1_agreement,
            kl_nats=parity.mean_kl,
            positions=parity.tokens,
        )

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return dict(vars(self))


def choose_rows(
    task: TaskFile | None, tokenizer: Tokenizer, vocabulary: int, max_length: int
) -> list[NDArray[np.int64]]:
    """Choose rows of real tokens to compare on.

    Args:
        task: Its first lines are used; None for a built-in text.
        tokenizer: The model's tokenizer.
        vocabulary: Tokens that the model chooses from.
        max_length: Most tokens that the model reads at once.

    Returns:
        Token ids, int64 `[1, tokens]` each: the beginnings of lines, 512 positions in all, or
        fewer where the vocabulary is very large.
    """
    most = max(1, min(_POSITIONS, _MOST_LOGITS // vocabulary))
    length = min(_ROW_TOKENS, max_length, most)
    texts: list[list[int]] = []
    if task is not None:
        texts = [tokenizer.encode(record.calibration_text).ids for record in task.records]
    texts = [text for text in texts if text and max(text) < vocabulary]
    if not texts:
        ids = sample_tokens(None, tokenizer, vocabulary)
        texts = [ids[start : start + length] for start in range(0, len(ids), length)]
    rows, left = [], most
    for text in texts:
        row = text[: min(length, left)]
        rows.append(np.array([row], np.int64))
        left -= len(row)
        if left <= 0:
            break
    return rows


class _TakeLogits(LayerTask):
    """Runs rows as they are, and keeps their logits."""

    watches = True

    def __init__(self) -> None:
        self.logits: list[NDArray[np.float32]] = []

    def take(self, number: int, logits: torch.Tensor) -> None:
        """Add the logits of the next row, `[1, tokens, vocabulary]`."""
        assert number == len(self.logits)
        self.logits.append(logits[0].float().numpy())


def run_checkpoint(
    provider: LayerProvider,
    rows: Sequence[NDArray[np.int64]],
    work: WorkDirectory | None = None,
    name: str = "",
) -> list[NDArray[np.float32]]:
    """Run the checkpoint on rows.

    Args:
        provider: The checkpoint, in float32.
        rows: Token ids, int64 `[1, tokens]` each.
        work: Keeps outputs of layers that are read one by one; nothing is left there.
        name: Distinguishes these rows from others that use the same directory.

    Returns:
        For each row its logits, float32 `[tokens, vocabulary]`.
    """
    asked = _TakeLogits()
    run_layers(
        provider,
        [Batch(torch.from_numpy(row)) for row in rows],
        asked,
        description="run the checkpoint",
        take=asked.take,
        work=work,
        name=f"reference {name}",
    )
    return asked.logits


def measure_agreement(
    runner: Runner,
    rows: Sequence[NDArray[np.int64]],
    reference: Sequence[NDArray[np.float32]],
    k_cap: Sequence[int],
) -> Agreement:
    """Run a graph on rows, and compare it with the checkpoint.

    Args:
        runner: The graph.
        rows: Token ids, int64 `[1, tokens]` each.
        reference: The checkpoint's logits, float32 `[tokens, vocabulary]` each.
        k_cap: Full k of each MoE layer.

    Returns:
        The agreement.
    """
    same: list[NDArray[np.bool_]] = []
    divergences: list[NDArray[np.float64]] = []

    def take(number: int, logits: np.ndarray[Any, np.dtype[np.float32]]) -> None:
        here, there = logits[0], reference[number]
        same.append(here.argmax(-1) == there.argmax(-1))
        expected = log_softmax(there)
        divergences.append((np.exp(expected) * (expected - log_softmax(here))).sum(-1))

    runner.run_calls([Call(row) for row in rows], k_cap, take)
    return Agreement(
        same_token_share=float(np.concatenate(same).mean()),
        # The sum of rounded terms may end a little below zero.
        kl_nats=max(0.0, float(np.concatenate(divergences).mean())),
        positions=sum(row.size for row in rows),
    )
