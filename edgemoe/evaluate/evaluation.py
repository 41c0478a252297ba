"""Judge a task: perplexity of text and completions, accuracy of choices, exact match."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from edgemoe.errors import CheckpointError
from edgemoe.evaluate.exact_match import check_generates, count_exact_matches
from edgemoe.evaluate.intervals import RESAMPLES, bootstrap_perplexity, wilson_interval
from edgemoe.evaluate.requests import Question, build_questions

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from edgemoe.evaluate.exact_match import Generate
    from edgemoe.evaluate.scorer import Logprobs, Scorer
    from edgemoe.tasks import TaskFile


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How a model does on a task.

    Attributes:
        task: The task's name.
        metric: ``perplexity`` for text and completions, ``accuracy`` for choices,
            ``exact_match`` for completions that were generated.
        value: The metric.
        ci95: Its 95% interval: for perplexity a bootstrap over lines, for the others Wilson's.
        n: Lines that were scored.
        perplexity: exp(mean negative log-likelihood per token) of the scored tokens; for
            choices those of the right choice.
        tokens: Tokens that the perplexity covers.
        details: What else was measured.
        line_losses: Negative log-likelihood per line in nats, for paired comparisons.
        line_tokens: Scored tokens per line.
        line_hits: Per line of choices 1 where the right one is likeliest in total, else 0.
    """

    task: str
    metric: Literal["perplexity", "accuracy", "exact_match"]
    value: float
    ci95: tuple[float, float]
    n: int
    perplexity: float
    tokens: int
    details: dict[str, Any] = field(default_factory=dict)
    line_losses: tuple[float, ...] = field(default=(), repr=False)
    line_tokens: tuple[int, ...] = field(default=(), repr=False)
    line_hits: tuple[int, ...] = field(default=(), repr=False)

    def to_dict(self, *, details: bool = False) -> dict[str, Any]:
        """Return what ``edgemoe evaluate --json`` answers.

        Args:
            details: Whether to add the key ``details``.

        Returns:
            A dictionary that JSON can hold.
        """
        value: dict[str, Any] = {
            "task": self.task,
            "metric": self.metric,
            "value": self.value,
            "ci95": list(self.ci95),
            "n": self.n,
            "perplexity": self.perplexity,
            "tokens": self.tokens,
        }
        return {**value, "details": self.details} if details else value


def evaluate(
    scorer: Scorer,
    task: TaskFile,
    tokenizer: Tokenizer,
    *,
    max_tokens: int | None = None,
    generate: Generate | None = None,
) -> Evaluation:
    """Judge a model on a task.

    Args:
        scorer: The model.
        task: What to judge it on.
        tokenizer: The model's tokenizer.
        max_tokens: Read the task's first lines only, up to so many tokens: text is cut there,
            completions and choices stop before the line that would exceed it.
        generate: Judge completions by exact match of what this generates, besides their
            perplexity.

    Returns:
        The evaluation.

    Raises:
        TaskFileError: No token can be scored, a completion is longer than the model's
            longest sequence, or ``generate`` is given for a task without completions.
        CheckpointError: The model answers NaN or infinity.
    """
    if generate is not None:
        check_generates(task)
    questions = build_questions(
        task, tokenizer, max_length=scorer.max_length, max_tokens=max_tokens
    )
    answers = scorer.score([request for q in questions for request in q.requests])
    rows: list[list[list[Logprobs]]] = []
    taken = 0
    for question in questions:
        rows.append(answers[taken : taken + len(question.requests)])
        taken += len(question.requests)
    losses = [-_answer_loglikelihood(q, row) for q, row in zip(questions, rows, strict=True)]
    tokens = [_answer_tokens(question) for question in questions]
    if not all(np.isfinite(part).all() for row in rows for parts in row for part in parts):
        raise CheckpointError(
            f"log-probabilities must be finite, got NaN or infinity on task {task.name!r}. The "
            "model overflows; use fp32."
        )
    perplexity = float(np.exp(sum(losses) / sum(tokens)))
    common: dict[str, Any] = {
        "task": task.name,
        "n": len(questions),
        "perplexity": perplexity,
        "tokens": sum(tokens),
        "line_losses": tuple(losses),
        "line_tokens": tuple(tokens),
    }
    perplexity_ci95 = bootstrap_perplexity(np.asarray(losses), np.asarray(tokens, np.float64))
    data = {"file_sha256": task.sha256, "lines": len(task.records), "max_tokens": max_tokens}
    n = len(questions)
    if generate is not None:
        matches = count_exact_matches(
            generate, task, questions, tokenizer, max_length=scorer.max_length
        )
        return Evaluation(
            metric="exact_match",
            value=matches / n,
            ci95=wilson_interval(matches, n),
            details={
                "interval": "Wilson score",
                "perplexity_ci95": list(perplexity_ci95),
                **data,
            },
            **common,
        )
    if task.kind != "choice":
        return Evaluation(
            metric="perplexity",
            value=perplexity,
            ci95=perplexity_ci95,
            details={
                "interval": f"bootstrap over lines, {RESAMPLES} resamples, seed 0",
                **data,
            },
            **common,
        )
    line_hits, hits_per_character = _find_hits(questions, rows)
    hits = sum(line_hits)
    return Evaluation(
        metric="accuracy",
        line_hits=tuple(line_hits),
        value=hits / n,
        ci95=wilson_interval(hits, n),
        details={
            "interval": "Wilson score",
            "accuracy_per_character": hits_per_character / n,
            "accuracy_per_character_ci95": list(wilson_interval(hits_per_character, n)),
            "accuracy_of_most_frequent_answer": _majority(questions),
            "accuracy_of_chance": float(np.mean([1 / len(q.characters) for q in questions])),
            "perplexity_ci95": list(perplexity_ci95),
            **data,
        },
        **common,
    )


def _answer_loglikelihood(question: Question, row: list[list[Logprobs]]) -> float:
    return float(sum(answers[question.answer].sum() for answers in row))


def _answer_tokens(question: Question) -> int:
    return sum(len(request.continuations[question.answer]) for request in question.requests)


def _find_hits(
    questions: list[Question], rows: list[list[list[Logprobs]]]
) -> tuple[list[int], int]:
    """Tell whose right choice is likeliest in total, and count those per character."""
    total, per_character = [], 0
    for question, (choices,) in zip(questions, rows, strict=True):
        scores = np.array([logprobs.sum() for logprobs in choices])
        total.append(int(np.argmax(scores) == question.answer))
        per_character += int(np.argmax(scores / question.characters) == question.answer)
    return total, per_character


def _majority(questions: list[Question]) -> float:
    """Return the accuracy of always giving the most frequent right answer's text."""
    texts = [question.answer_text for question in questions]
    return max(texts.count(text) for text in set(texts)) / len(texts)
