"""Answers of a session: texts, choices and scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgemoe_runtime.adaptive_k.k_cap import compact

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgemoe_runtime.adaptive_k.adaptation import KMove
    from edgemoe_runtime.fallback import Fallback
    from edgemoe_runtime.json_fields import Json


@dataclass(frozen=True, kw_only=True)
class Generation:
    """A generated text; `str()` of it is the text.

    Attributes:
        text: new text, without the prompt, the stop string and what follows it.
        tokens: new token ids, with the end-of-text token where it ended the answer.
        prompt_tokens: tokens of the prompt.
        new_tokens: number of `tokens`.
        seconds: wall-clock time of the whole request.
        prefill_seconds: the part of it before the first new token.
        experts_per_token: experts that a token of prompt and answer ran through per MoE layer,
            averaged over layers and, where tokens choose their number, over tokens.
        k_cap: cap of experts per token that was in force at the end, by MoE layer.
        backend: engine and provider that ran.
        fallbacks: engines that could not be used, and a deadline that no rung of the k ladder
            could keep, with reasons.
        finish_reason: `stop` (stop string), `eos`, `length` (max_new_tokens), or `max_length`
            (the cache is full).
        deadline_ms: the session's deadline, or None.
        token_ms: time that a new token may take, or None.
        late_tokens: new tokens that took longer than that.
        k_moves: changes of the cap during this request, with reasons.
    """

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    new_tokens: int
    seconds: float
    prefill_seconds: float
    experts_per_token: float
    k_cap: tuple[int, ...]
    backend: str
    fallbacks: tuple[Fallback, ...]
    finish_reason: str
    deadline_ms: float | None
    token_ms: float | None = None
    late_tokens: int = 0
    k_moves: tuple[KMove, ...] = ()

    @property
    def ms_per_token(self) -> float:
        """Milliseconds of the whole request per new token."""
        return 1000.0 * self.seconds / self.new_tokens

    @property
    def deadline_met(self) -> bool | None:
        """Whether the request ended in time; None where there was no deadline."""
        return meets_deadline(self.seconds, self.deadline_ms)

    def __str__(self) -> str:
        return self.text

    def to_dict(self) -> dict[str, Json]:
        """Convert to JSON.

        Returns:
            One key for each attribute and property; `k_cap` is one number where all layers
            have the same.
        """
        return {
            "text": self.text,
            "tokens": list(self.tokens),
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "seconds": self.seconds,
            "prefill_seconds": self.prefill_seconds,
            "ms_per_token": self.ms_per_token,
            "experts_per_token": self.experts_per_token,
            "k_cap": _as_json(self.k_cap),
            "backend": self.backend,
            "fallbacks": [dict(fallback.to_dict()) for fallback in self.fallbacks],
            "finish_reason": self.finish_reason,
            "deadline_ms": self.deadline_ms,
            "deadline_met": self.deadline_met,
            "token_ms": self.token_ms,
            "late_tokens": self.late_tokens,
            "k_moves": [move.to_dict() for move in self.k_moves],
        }


@dataclass(frozen=True, kw_only=True)
class Score:
    """Log-likelihood of a completion after a prompt, which `float()` of it returns.

    Attributes:
        log_likelihood: natural logarithm, summed over the completion's tokens.
        tokens: tokens of the completion.
        characters: characters of the completion.
    """

    log_likelihood: float
    tokens: int
    characters: int

    def __float__(self) -> float:
        return self.log_likelihood

    @property
    def per_token(self) -> float:
        """Log-likelihood per token."""
        return self.log_likelihood / self.tokens

    @property
    def per_character(self) -> float:
        """Log-likelihood per character."""
        return self.log_likelihood / self.characters


class Classification(str):
    """The chosen one of the choices: a string, with the scores of all.

    Attributes:
        choice_index: position of the choice among the choices.
        choices: all of them.
        scores: log-likelihood of each choice after the prompt.
        values: values that were compared: scores in total, or per token or character.
        seconds: wall-clock time of the request.
        deadline_ms: the session's deadline, or None.
        experts_per_token: experts that a token ran through per MoE layer, averaged.
        k_cap: cap of experts per token that was in force at the end, by MoE layer.
        fallbacks: engines that could not be used, an answer of low confidence, and a deadline
            that no rung of the k ladder could keep, with reasons.
        k_moves: changes of the cap during this request, with reasons.
    """

    choice_index: int
    choices: tuple[str, ...]
    scores: tuple[Score, ...]
    values: tuple[float, ...]
    seconds: float
    deadline_ms: float | None
    experts_per_token: float
    k_cap: tuple[int, ...]
    fallbacks: tuple[Fallback, ...]
    k_moves: tuple[KMove, ...]

    def __new__(
        cls,
        choices: Sequence[str],
        scores: Sequence[Score],
        values: Sequence[float],
        *,
        seconds: float,
        deadline_ms: float | None,
        experts_per_token: float,
        k_cap: tuple[int, ...],
        fallbacks: tuple[Fallback, ...],
        k_moves: tuple[KMove, ...],
    ) -> Classification:
        """Choose the choice with the highest value; the first of equals.

        Args:
            choices: all of them.
            scores: log-likelihood of each.
            values: values to compare.
            seconds: wall-clock time of the request.
            deadline_ms: the session's deadline, or None.
            experts_per_token: experts that a token ran through per MoE layer, averaged.
            k_cap: cap of experts per token at the end, by MoE layer.
            fallbacks: with reasons.
            k_moves: changes of the cap, with reasons.
        """
        best = max(range(len(values)), key=lambda index: values[index])
        answer = super().__new__(cls, choices[best])
        answer.choice_index = best
        answer.choices = tuple(choices)
        answer.scores = tuple(scores)
        answer.values = tuple(values)
        answer.seconds = seconds
        answer.deadline_ms = deadline_ms
        answer.experts_per_token = experts_per_token
        answer.k_cap = k_cap
        answer.fallbacks = fallbacks
        answer.k_moves = k_moves
        return answer

    @property
    def margin(self) -> float:
        """By how much the best value is above the second best; 0 for a single choice."""
        if len(self.values) < 2:
            return 0.0
        second, best = sorted(self.values)[-2:]
        return best - second

    @property
    def deadline_met(self) -> bool | None:
        """Whether the request ended in time; None where there was no deadline."""
        return meets_deadline(self.seconds, self.deadline_ms)

    def to_dict(self) -> dict[str, Json]:
        """Convert to JSON.

        Returns:
            One key for each attribute and property, with `choice` and `log_likelihoods`;
            `k_cap` is one number where all layers have the same.
        """
        return {
            "choice": str(self),
            "choice_index": self.choice_index,
            "choices": list(self.choices),
            "log_likelihoods": [score.log_likelihood for score in self.scores],
            "values": list(self.values),
            "margin": self.margin,
            "seconds": self.seconds,
            "deadline_ms": self.deadline_ms,
            "deadline_met": self.deadline_met,
            "experts_per_token": self.experts_per_token,
            "k_cap": _as_json(self.k_cap),
            "fallbacks": [dict(fallback.to_dict()) for fallback in self.fallbacks],
            "k_moves": [move.to_dict() for move in self.k_moves],
        }


def _as_json(k_cap: Sequence[int]) -> Json:
    short = compact(k_cap)
    return short if isinstance(short, int) else list(short)


def meets_deadline(seconds: float, deadline_ms: float | None) -> bool | None:
    """Return whether a request of this length was in time; None without a deadline."""
    return None if deadline_ms is None else 1000.0 * seconds <= deadline_ms
