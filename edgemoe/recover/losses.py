"""The two losses of a recovery: cross-entropy on the task, divergence from a teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn.functional import log_softmax
from torch.utils.checkpoint import checkpoint

from edgemoe.evaluate.batches import pad

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgemoe.evaluate.scorer import Request

# Rows of logits that are in memory a second time, as probabilities.
_ROWS_AT_ONCE = 64


class LossSums(NamedTuple):
    """Sums over tokens, float32 scalars in nats.

    Attributes:
        divergence: T^2 KL(teacher || student); 0 without a teacher.
        cross_entropy: -log q(token | all before it) of the scored tokens.
    """

    divergence: torch.Tensor
    cross_entropy: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Sequences side by side, padded on the right.

    Attributes:
        ids: Inputs, int64 [rows, width].
        targets: The token after each, int64 [rows, width].
        valid: 1 where a target is a token, 0 where it is padding, float32 [rows, width].
        scored: 1 where the target is of a continuation, float32 [rows, width].
    """

    ids: torch.Tensor
    targets: torch.Tensor
    valid: torch.Tensor
    scored: torch.Tensor

    @classmethod
    def of(cls, requests: Sequence[Request], device: torch.device) -> Batch:
        """Put sequences of one continuation each side by side.

        Args:
            requests: The sequences.
            device: Where the batch is needed.

        Returns:
            The batch.
        """
        rows = [(*request.context, *request.continuations[0]) for request in requests]
        whole = pad(rows)
        valid = torch.zeros(whole.shape[0], whole.shape[1] - 1)
        scored = torch.zeros_like(valid)
        for index, (row, request) in enumerate(zip(rows, requests, strict=True)):
            valid[index, : len(row) - 1] = 1
            scored[index, len(request.context) - 1 : len(row) - 1] = 1
        return cls(
            ids=whole[:, :-1].to(device),
            targets=whole[:, 1:].to(device),
            valid=valid.to(device),
            scored=scored.to(device),
        )


def count_tokens(requests: Sequence[Request]) -> tuple[int, int]:
    """Count what the sums of sequences go over.

    Args:
        requests: Sequences of one continuation each.

    Returns:
        Tokens with a divergence: all but the first of each; and scored tokens.
    """
    return (
        sum(request.longest - 1 for request in requests),
        sum(len(request.continuations[0]) for request in requests),
    )


def add_up(
    logits: torch.Tensor,
    teacher_logits: torch.Tensor | None,
    batch: Batch,
    temperature: float = 1.0,
) -> LossSums:
    """Sum both losses over a batch.

    With p = softmax(teacher / T) and q = softmax(student / T) over the vocabulary, the
    divergence of a token is `T^2 sum_v p(v) (log p(v) - log q(v))`: the square keeps the size
    of its gradient (https://arxiv.org/abs/1503.02531). Probabilities are computed again for the
    gradient, a few rows at a time, because all of them at once take several times the logits.

    Args:
        logits: The student's, [rows, width, vocabulary].
        teacher_logits: The teacher's, of the same shape and without gradients, if any.
        batch: What the logits are of.
        temperature: T, in (0, inf).

    Returns:
        The sums, with gradients.
    """
    divergence = cross_entropy = logits.new_zeros(())
    width = logits.shape[-1]
    pieces = torch.split(logits.reshape(-1, width), _ROWS_AT_ONCE)
    teachers = (
        [None] * len(pieces)
        if teacher_logits is None
        else torch.split(teacher_logits.reshape(-1, width), _ROWS_AT_ONCE)
    )
    flat = [
        torch.split(part.reshape(-1), _ROWS_AT_ONCE)
        for part in (batch.targets, batch.valid, batch.scored)
    ]
    for piece in zip(pieces, teachers, *flat, strict=True):
        sums = checkpoint(
            _sum_rows, *piece, temperature, use_reentrant=False, preserve_rng_state=False
        )
        divergence = divergence + sums[0]
        cross_entropy = cross_entropy + sums[1]
    return LossSums(divergence, cross_entropy)


def _sum_rows(
    student: torch.Tensor,
    teacher: torch.Tensor | None,
    targets: torch.Tensor,
    valid: torch.Tensor,
    scored: torch.Tensor,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    log_q = log_softmax(student.float(), dim=-1)
    cross_entropy = -(log_q.gather(1, targets[:, None])[:, 0] * scored).sum()
    if teacher is None:
        return cross_entropy.new_zeros(()), cross_entropy
    if temperature != 1:
        log_q = log_softmax(student.float() / temperature, dim=-1)
    log_p = log_softmax(teacher.float() / temperature, dim=-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
    return temperature**2 * (divergence * valid).sum(), cross_entropy
