"""Requests as batches of padded rows, and the log-probabilities that are picked from logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from edgemoe.layerwise.batch import Batch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgemoe.evaluate.scorer import Logprobs, Request

BATCH_TOKENS = 512
PAD = 0
_ROWS_AT_ONCE = 64


class ScoreBatch:
    """Continuations with their contexts, padded on the right to one batch.

    Attributes:
        batch: What runs.
        real: Which of its tokens are no padding, bool [rows, longest].
    """

    def __init__(self, requests: Sequence[Request], rows: Sequence[tuple[int, int]]) -> None:
        """Make a batch.

        Args:
            requests: What is to be scored.
            rows: The request and the continuation that each row is, by their positions.
        """
        self._rows = [(one, requests[one], choice) for one, choice in rows]
        # Position t predicts token t + 1, so the last token of a row is never an input.
        lines = [(r.context + r.continuations[choice])[:-1] for _, r, choice in self._rows]
        ids = pad(lines)
        self._first = min(len(request.context) for _, request, _ in self._rows) - 1
        self.batch = Batch(ids, ids.shape[1] - self._first)
        self.real = real_tokens(lines)

    def gather(self, logits: torch.Tensor) -> list[tuple[int, Logprobs]]:
        """Pick the log-probabilities of the continuations.

        Args:
            logits: Of the batch [rows, positions, vocabulary].

        Returns:
            For each row its request and what `gather` returns.
        """
        scored = []
        for (one, request, choice), row in zip(self._rows, logits, strict=True):
            start = len(request.context) - 1 - self._first
            targets = request.continuations[choice]
            scored.append((one, gather(row[start : start + len(targets)], targets)))
        return scored


def pad(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Make a batch of rows of token ids, padded on the right, int64 [rows, longest]."""
    width = max(map(len, rows))
    padded = [[*row, *[PAD] * (width - len(row))] for row in rows]
    return torch.tensor(padded, dtype=torch.int64)


def real_tokens(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Return which tokens of a padded batch are no padding, bool [rows, longest]."""
    lengths = torch.tensor([len(row) for row in rows])
    return torch.arange(int(lengths.max())) < lengths[:, None]


def make_batches(requests: Sequence[Request], batch_tokens: int) -> list[list[int]]:
    """Group requests by length; those with several continuations stay alone.

    Args:
        requests: What is to be scored.
        batch_tokens: Tokens of a batch, padding included.

    Returns:
        Positions of the requests of each batch.
    """
    alone: list[list[int]] = []
    batches: list[list[int]] = []
    open_width = 0
    for index in sorted(range(len(requests)), key=lambda index: -requests[index].longest):
        request = requests[index]
        if len(request.continuations) > 1:
            alone.append([index])
        # The first of a batch is its longest, so it sets the width of all.
        elif open_width and (len(batches[-1]) + 1) * open_width <= batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
            open_width = request.longest
    return alone + batches


def gather(logits: torch.Tensor, targets: Sequence[int]) -> Logprobs:
    """Pick the log-probability of one token per row.

    Args:
        logits: Logits [tokens, vocabulary].
        targets: The tokens.

    Returns:
        log softmax(logits)[t, targets[t]], float64 [tokens].
    """
    ids = torch.tensor(targets, dtype=torch.int64, device=logits.device)
    parts = []
    for start in range(0, len(targets), _ROWS_AT_ONCE):
        rows = logits[start : start + _ROWS_AT_ONCE].double()
        chosen = rows.gather(1, ids[start : start + _ROWS_AT_ONCE, None])[:, 0]
        parts.append(chosen - rows.logsumexp(dim=-1))
    scored: Logprobs = torch.cat(parts).cpu().numpy()
    return scored
