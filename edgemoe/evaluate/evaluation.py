"""Judge a task: perplexity of text and completions, accuracy of choices, exact match."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from edgemoe.errors import CheckpointError
from edgemoe.evaluate.exact_match import check_generates, count_exact_matches
from edgemoe.evaluate.intervals import RESAMPLES, bootstrap_perplexity, wilson_interval
from edgemoe.evaluate.requests import EvalExample, build_examples, resolve_window
from edgemoe.evaluate.rolling import exp_or_none, summarise_rolling

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from tokenizers import Tokenizer

    from edgemoe.evaluate.exact_match import Generate
    from edgemoe.evaluate.scorer import Logprobs, Request, Scorer
    from edgemoe.tasks import TaskFile


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Score of a model on a task, with its confidence interval.

    Attributes:
        task: The task's name.
        metric: `perplexity` for text and completions, `accuracy` for choices,
            `exact_match` for completions that were generated.
        value: The metric.
        ci95: Its 95% interval: for perplexity a bootstrap over lines, for the others Wilson's.
        n: Lines that were scored.
        perplexity: exp(mean negative log-likelihood per token) of the scored tokens; for
            choices those of the right choice.
        tokens: Tokens that the perplexity covers.
        details: What else was measured.
        experts_per_token: Experts that scored tokens used per MoE layer, averaged over both;
            None where that is not known.
        line_losses: Negative log-likelihood per line in nats, for paired comparisons.
        line_tokens: Scored tokens per line.
        line_hits: Per line of choices 1 where the right one is likeliest in total, else 0.
        line_values: Per line of choices the log-likelihood of each in total, in nats.
    """

    task: str
    metric: Literal["perplexity", "accuracy", "exact_match"]
    value: float
    ci95: tuple[float, float]
    n: int
    perplexity: float
    tokens: int
    details: dict[str, Any] = field(default_factory=dict)
    experts_per_token: float | None = None
    line_losses: tuple[float, ...] = field(default=(), repr=False)
    line_tokens: tuple[int, ...] = field(default=(), repr=False)
    line_hits: tuple[int, ...] = field(default=(), repr=False)
    line_values: tuple[tuple[float, ...], ...] = field(default=(), repr=False)

    def to_dict(self, *, details: bool = False) -> dict[str, Any]:
        """Return what `edgemoe evaluate --json` answers.

        Args:
            details: Whether to add the key `details`.

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

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Evaluation:
        """Read what `dataclasses.asdict` and JSON made of an evaluation.

        Args:
            document: The JSON object.

        Returns:
            The evaluation; JSON has lists where it has tuples.
        """
        plain: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in document.items()
        }
        values = tuple(tuple(line) for line in document.get("line_values", ()))
        plain["line_values"] = values
        return cls(**plain)


def evaluate(
    scorer: Scorer,
    task: TaskFile,
    tokenizer: Tokenizer,
    *,
    max_tokens: int | None = None,
    generate: Generate | None = None,
    window: int | None = None,
    prefix_token: int | None = None,
) -> Evaluation:
    """Judge a model on a task.

    What the numbers are, and which of lm-eval's they equal, is in docs/guides/evaluation.md.

    Args:
        scorer: The model.
        task: What to judge it on.
        tokenizer: The model's tokenizer.
        max_tokens: Read the task's first lines only, up to so many tokens: text is cut there,
            completions and choices stop before the line that would exceed it.
        generate: Judge completions by exact match of what this generates, besides their
            perplexity.
        window: Most tokens of a window of text, in [2, longest sequence of the model]; None
            takes 512, or what the model takes.
        prefix_token: Score texts as a whole too, their first token after this one: the details
            then have lm-eval's word and byte perplexity.

    Returns:
        The evaluation.

    Raises:
        TaskFileError: No token can be scored, a completion is longer than the model's
            longest sequence, `generate` is given for a task without completions, or
            `max_tokens` or `window` is out of range.
        CheckpointError: The model answers NaN or infinity.
    """
    if generate is not None:
        check_generates(task)
    asked = build_examples(
        task,
        tokenizer,
        max_length=scorer.max_length,
        max_tokens=max_tokens,
        window=window,
        prefix_token=prefix_token,
    )
    scores = _score(scorer, asked)
    questions = [question for question in asked if question.requests]
    # By question the log-probabilities of each continuation.
    rows = [
        [logprobs for request in question.requests for logprobs in scores[request]]
        for question in questions
    ]
    judged = [_judged(question) for question in questions]
    losses = [
        -float(sum(row[index].sum() for index in indices))
        for row, indices in zip(rows, judged, strict=True)
    ]
    tokens = [
        sum(len(question.continuations[index]) for index in indices)
        for question, indices in zip(questions, judged, strict=True)
    ]
    if not all(np.isfinite(part).all() for parts in scores.values() for part in parts):
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
    if task.kind == "choice":
        hits = _find_hits(questions, rows)
        total, per_character, per_byte = hits.sum(axis=0).tolist()
        return Evaluation(
            metric="accuracy",
            line_hits=tuple(hits[:, 0].tolist()),
            line_values=tuple(tuple(float(part.sum()) for part in row) for row in rows),
            value=total / n,
            ci95=wilson_interval(total, n),
            details={
                "interval": "Wilson score",
                "accuracy_per_character": per_character / n,
                "accuracy_per_character_ci95": list(wilson_interval(per_character, n)),
                "accuracy_per_byte": per_byte / n,
                "accuracy_per_byte_ci95": list(wilson_interval(per_byte, n)),
                "accuracy_of_most_frequent_answer": _majority(questions),
                "accuracy_of_chance": float(np.mean([1 / len(q.choices) for q in questions])),
                "perplexity_ci95": list(perplexity_ci95),
                **data,
            },
            **common,
        )
    more: dict[str, Any] = (
        _summarise_texts(asked, scores, resolve_window(window, scorer.max_length), prefix_token)
        if task.kind == "text"
        else {"perplexity_per_line": exp_or_none(sum(losses) / n)}
    )
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
                **more,
                **data,
            },
            **common,
        )
    return Evaluation(
        metric="perplexity",
        value=perplexity,
        ci95=perplexity_ci95,
        details={
            "interval": f"bootstrap over lines, {RESAMPLES} resamples, seed 0",
            **more,
            **data,
        },
        **common,
    )


def _score(scorer: Scorer, questions: list[EvalExample]) -> dict[Request, list[Logprobs]]:
    """Score what is asked for, twice or more often too, once."""
    requests = list(
        dict.fromkeys(
            request
            for question in questions
            for request in (
                *question.requests,
                *(question.rolling.requests if question.rolling else ()),
            )
        )
    )
    return dict(zip(requests, scorer.score(requests), strict=True))


def _judged(question: EvalExample) -> list[int]:
    """Return which continuations the perplexity covers: the right one, or all of a text."""
    return [question.answer] if question.choices else list(range(len(question.requests)))


def _find_hits(questions: list[EvalExample], rows: list[list[Logprobs]]) -> NDArray[np.int64]:
    """Find where the right choice is likeliest in total, per character and per byte."""
    hits = np.zeros((len(questions), 3), np.int64)
    for line, (question, row) in enumerate(zip(questions, rows, strict=True)):
        scores = np.array([logprobs.sum() for logprobs in row])
        characters = np.array([len(choice) for choice in question.choices])
        utf8_bytes = np.array([len(choice.encode()) for choice in question.choices])
        chosen = [scores, scores / characters, scores / utf8_bytes]
        hits[line] = np.argmax(chosen, axis=1) == question.answer
    return hits


def _majority(questions: list[EvalExample]) -> float:
    """Return the accuracy of always giving the most frequent right answer's text."""
    texts = [question.choices[question.answer] for question in questions]
    return max(texts.count(text) for text in set(texts)) / len(texts)


def _summarise_texts(
    questions: list[EvalExample],
    scores: dict[Request, list[Logprobs]],
    window: int,
    prefix_token: int | None,
) -> dict[str, Any]:
    """Return the windows, and with a prefix token the likelihood of the texts as a whole."""
    if prefix_token is None:
        return {"window_tokens": window}
    texts = [question.rolling for question in questions if question.rolling is not None]
    sums = [float(sum(scores[request][0].sum() for request in text.requests)) for text in texts]
    return {
        "window_tokens": window,
        "prefix_token": prefix_token,
        **summarise_rolling(texts, sums),
    }
