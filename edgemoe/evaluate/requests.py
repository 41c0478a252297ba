"""From the lines of a task file to what a scorer is asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgemoe.errors import TaskFileError
from edgemoe.evaluate.scorer import Request
from edgemoe.tasks import ChoiceRecord, TextRecord

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from edgemoe.tasks import CompletionRecord, TaskFile

WINDOW_TOKENS = 512
PROMPT_TOKENS = 2048


@dataclass(frozen=True, kw_only=True)
class Question:
    """One line of a task file, ready to be scored.

    Attributes:
        requests: One per window of a text; one for a completion or for all choices.
        answer: Index of the right continuation.
        characters: Length of each choice, for accuracy per character.
        answer_text: The right choice.
    """

    requests: tuple[Request, ...]
    answer: int = 0
    characters: tuple[int, ...] = ()
    answer_text: str = ""


def build_questions(
    task: TaskFile, tokenizer: Tokenizer, *, max_length: int, max_tokens: int | None
) -> list[Question]:
    """Tokenise a task.

    A text is cut into windows of at most 512 tokens that do not overlap; the first token of
    each window has no context and is not scored. A prompt and what follows it are tokenised
    together, as the model would read them; scored is what follows the longest run of tokens
    that the prompt and all its continuations share, so a token across the seam counts to
    the continuation. Prompts too long for the model lose their beginning.

    Args:
        task: The task.
        tokenizer: The model's tokenizer.
        max_length: Most tokens that the model takes at once.
        max_tokens: Stop when so many tokens were read; None reads all.

    Returns:
        One question per line that has a token to score.

    Raises:
        TaskFileError: No line has a token to score.
        TaskFileError: A completion or choice alone is longer than ``max_length``, or choices
            have no token before them.
    """
    if max_tokens is not None and max_tokens < 2:
        raise TaskFileError(f"max_tokens must be in [2, inf), got {max_tokens}.")
    questions: list[Question] = []
    left = max_tokens
    for record in task.records:
        if isinstance(record, TextRecord):
            ids = tokenizer.encode(record.text).ids[:left]
            question, read = _ask_text(ids, min(WINDOW_TOKENS, max_length)), len(ids)
        else:
            limit = min(PROMPT_TOKENS, max_length)
            where = f"{task.path}, line {record.line}"
            question = _ask_continuations(record, tokenizer, limit, where)
            (request,) = question.requests
            read = len(request.context) + sum(map(len, request.continuations))
            if left is not None and read > left and questions:
                break
        if question.requests:
            questions.append(question)
        if left is not None:
            left -= read
            if left < 2:
                break
    if not questions:
        raise TaskFileError(
            f"task {task.name!r} must have a line of two or more tokens: the first token of a "
            f"text has no context to be judged in. Got none in {task.path}."
        )
    return questions


def _ask_text(ids: list[int], window: int) -> Question:
    windows = (ids[start : start + window] for start in range(0, len(ids), window))
    return Question(
        requests=tuple(Request((w[0],), (tuple(w[1:]),)) for w in windows if len(w) > 1)
    )


def _ask_continuations(
    record: CompletionRecord | ChoiceRecord, tokenizer: Tokenizer, limit: int, where: str
) -> Question:
    choices = record.choices if isinstance(record, ChoiceRecord) else (record.completion,)
    wholes = [tokenizer.encode(record.prompt + choice).ids for choice in choices]
    shared = _count_shared([tokenizer.encode(record.prompt).ids, *wholes])
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
    return Question(
        requests=(Request(tuple(context[-(limit - longest) :]), continuations),),
        answer=record.answer if isinstance(record, ChoiceRecord) else 0,
        characters=tuple(map(len, choices)),
        answer_text=choices[record.answer] if isinstance(record, ChoiceRecord) else "",
    )


def _count_shared(sequences: list[list[int]]) -> int:
    """Count the tokens that all sequences begin with."""
    # The shortest sequence ends the comparison.
    for position, tokens in enumerate(zip(*sequences, strict=False)):
        if len(set(tokens)) > 1:
            return position
    return min(map(len, sequences))
