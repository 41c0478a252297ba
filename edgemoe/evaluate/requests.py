"""From the lines of a task file to what a scorer is asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgemoe.errors import TaskFileError
from edgemoe.evaluate.rolling import roll_text
from edgemoe.evaluate.scorer import Request
from edgemoe.tasks import ChoiceRecord, TextRecord
from edgemoe_runtime.decoding.tokenizer import encode_once

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tokenizers import Tokenizer

    from edgemoe.evaluate.rolling import RollingText
    from edgemoe.tasks import CompletionRecord, TaskFile

WINDOW_TOKENS = 512
PROMPT_TOKENS = 2048


@dataclass(frozen=True, kw_only=True)
class EvalExample:
    """One line of a task file, ready to be scored.

    Attributes:
        requests: One per window of a text, none for a text of one token; one for a completion
            or for all choices, or one per choice where the prompt was cut.
        answer: Index of the right continuation.
        choices: What is chosen from.
        rolling: The text again, to be scored whole.
    """

    requests: tuple[Request, ...]
    answer: int = 0
    choices: tuple[str, ...] = ()
    rolling: RollingText | None = None

    @property
    def continuations(self) -> list[tuple[int, ...]]:
        """The continuations of all requests."""
        return [one for request in self.requests for one in request.continuations]


def build_examples(
    task: TaskFile,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    max_tokens: int | None,
    window: int | None = None,
    prefix_token: int | None = None,
) -> list[EvalExample]:
    """Tokenise a task.

    A text is cut into windows that do not overlap; the first token of each window has no
    context and is not scored. A prompt and what follows it are tokenised together, as the model
    would read them; scored is what follows the longest run of tokens that the prompt, without
    white space at its end, and all its continuations share. So white space before a
    continuation counts to it, as in lm-eval, and so does a token across the seam. Prompts too
    long for the model lose their beginning.

    Args:
        task: The task.
        tokenizer: The model's tokenizer.
        max_length: Most tokens that the model reads at once.
        max_tokens: Stop when so many tokens were read; None reads all.
        window: Most tokens of a window of text, in [2, max_length]; None takes 512, or what the
            model takes.
        prefix_token: Score texts as a whole too, their first token after this one.

    Returns:
        One question per line that has a token to score.

    Raises:
        TaskFileError: No line has a token to score in its context.
        TaskFileError: A completion or choice alone is longer than `max_length`, or choices
            have no token before them.
        TaskFileError: `max_tokens` or `window` is out of range.
    """
    if max_tokens is not None and max_tokens < 2:
        raise TaskFileError(f"max_tokens must be in [2, inf), got {max_tokens}.")
    window = resolve_window(window, max_length)
    questions: list[EvalExample] = []
    left = max_tokens
    for record in task.records:
        if isinstance(record, TextRecord):
            question, read = _ask_text(record, tokenizer, window, prefix_token, left)
        else:
            # The last token is scored but never read.
            limit = min(PROMPT_TOKENS, max_length) + 1
            where = f"{task.path}, line {record.line}"
            question = _ask_continuations(record, tokenizer, limit, where)
            context = max(len(request.context) for request in question.requests)
            read = context + sum(map(len, question.continuations))
            if left is not None and read > left and questions:
                break
        if question.requests or question.rolling:
            questions.append(question)
        if left is not None:
            left -= read
            if left < 2:
                break
    if not any(question.requests for question in questions):
        raise TaskFileError(
            f"task {task.name!r} must have a line of two or more tokens: the first token of a "
            f"text has no context to be judged in. Got none in {task.path}."
        )
    return questions


def resolve_window(window: int | None, max_length: int) -> int:
    """Return how many tokens a window of text has.

    Args:
        window: What was asked for; None takes 512, or what the model takes.
        max_length: Most tokens that the model reads at once.

    Returns:
        The tokens, in [2, max_length].

    Raises:
        TaskFileError: `window` is out of range.
    """
    if window is None:
        return min(WINDOW_TOKENS, max_length)
    if not 2 <= window <= max_length:
        raise TaskFileError(
            f"a window must be in [2, {max_length}] tokens, since the model reads no more at "
            f"once, got {window}."
        )
    return window


def _ask_text(
    record: TextRecord,
    tokenizer: Tokenizer,
    window: int,
    prefix_token: int | None,
    left: int | None,
) -> tuple[EvalExample, int]:
    """Return the question, and how many tokens were read."""
    encoding = encode_once(tokenizer, record.text)
    ids = encoding.ids[:left]
    windows = (ids[start : start + window] for start in range(0, len(ids), window))
    question = EvalExample(
        requests=tuple(Request((w[0],), (tuple(w[1:]),)) for w in windows if len(w) > 1),
        rolling=None
        if prefix_token is None
        else roll_text(
            record.text, encoding, prefix_token=prefix_token, window=window, most_tokens=left
        ),
    )
    return question, len(ids)


def _ask_continuations(
    record: CompletionRecord | ChoiceRecord, tokenizer: Tokenizer, limit: int, where: str
) -> EvalExample:
    choices = record.choices if isinstance(record, ChoiceRecord) else (record.completion,)
    wholes = [encode_once(tokenizer, record.prompt + choice).ids for choice in choices]
    # A prompt of white space alone has nothing else to be context.
    before = encode_once(tokenizer, record.prompt.rstrip()).ids
    shared = count_shared([before or encode_once(tokenizer, record.prompt).ids, *wholes])
    if shared == 0 and len({tuple(whole[:1]) for whole in wholes}) > 1:
        # One choice's first token would be the context of the others.
        raise TaskFileError(
            f"{where}: a prompt and its choices must begin with the same token, got the prompt "
            f"{record.prompt!r}. Lengthen the prompt."
        )
    # A choice that begins as another one does, or merges with the prompt's last token, must
    # still have a token of its own.
    shared = max(1, min(shared, *(len(whole) - 1 for whole in wholes)))
    context = wholes[0][:shared]
    continuations = tuple(tuple(whole[shared:]) for whole in wholes)
    longest = max(map(len, continuations))
    if not all(continuations):
        raise TaskFileError(
            f"{where}: a prompt and what follows it must be two or more tokens together, got "
            "one. Lengthen the prompt."
        )
    if longest >= limit:
        raise TaskFileError(
            f"{where}: what follows a prompt must be under {limit} tokens, got {longest}. "
            "Shorten it, or use a text task."
        )
    if len(context) + longest <= limit:
        requests: tuple[Request, ...] = (Request(tuple(context), continuations),)
    else:
        # Each with as much of the prompt as there is room for, as in lm-eval.
        requests = tuple(
            Request(tuple(context[-(limit - len(one)) :]), (one,)) for one in continuations
        )
    return EvalExample(
        requests=requests,
        answer=record.answer if isinstance(record, ChoiceRecord) else 0,
        choices=choices,
    )


def count_shared(sequences: Sequence[Sequence[int]]) -> int:
    """Count the tokens that all sequences begin with."""
    # The shortest sequence ends the comparison.
    for position, tokens in enumerate(zip(*sequences, strict=False)):
        if len(set(tokens)) > 1:
            return position
    return min(map(len, sequences))
