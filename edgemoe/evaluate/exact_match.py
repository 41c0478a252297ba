"""Whether greedy generation gives the completions of a task back, word for word."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from edgemoe.errors import TaskFileError
from edgemoe.evaluate.requests import PROMPT_TOKENS, count_shared
from edgemoe.progress import track
from edgemoe.tasks import CompletionRecord
from edgemoe_runtime.decoding.tokenizer import encode_once

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tokenizers import Tokenizer

    from edgemoe.evaluate.requests import EvalExample
    from edgemoe.tasks import TaskFile

    Generate: TypeAlias = Callable[[str, int], str]
    """From a prompt and the most tokens to make, to the most likely text, token by token."""


def check_generates(task: TaskFile) -> None:
    """Refuse a task whose lines say nothing about what to generate.

    Args:
        task: The task.

    Raises:
        TaskFileError: It is not one of prompts and completions.
    """
    if task.kind != "completion":
        raise TaskFileError(
            "exact match needs lines of a prompt and a completion, got lines of kind "
            f"{task.kind} in {task.path}. Leave --generate out, or use another task file."
        )


def count_exact_matches(
    generate: Generate,
    task: TaskFile,
    questions: Sequence[EvalExample],
    tokenizer: Tokenizer,
    *,
    max_length: int,
) -> int:
    """Count the completions that generation gives back.

    The prompt is continued by as many tokens as the completion has, or until the end token.
    White space around the two is no difference.

    Args:
        generate: The model.
        task: A task of completions.
        questions: What `build_examples` made of its first lines.
        tokenizer: The model's tokenizer.
        max_length: Most tokens that the model takes at once.

    Returns:
        How many of the questions' lines match, in [0, len(questions)].
    """
    longest = min(PROMPT_TOKENS, max_length) - tokenizer.num_special_tokens_to_add(False)
    matches = 0
    pairs = zip(questions, task.records, strict=False)
    for _, record in track(pairs, "generate", total=len(questions)):
        assert isinstance(record, CompletionRecord)
        context, completion, new_tokens = _split(record, tokenizer, longest)
        matches += generate(context, new_tokens).strip() == completion.strip()
    return matches


def _split(
    record: CompletionRecord, tokenizer: Tokenizer, longest: int
) -> tuple[str, str, int]:
    """Return the text to continue, the one to find behind it, and that one's tokens.

    A tokenizer that joins a space to the word behind it joins a prompt's last space to the
    completion: the cut is then before the space. A long prompt loses its beginning.
    """
    text = record.prompt + record.completion
    encoding = encode_once(tokenizer, text)
    shared = count_shared([encode_once(tokenizer, record.prompt).ids, encoding.ids])
    seam = max(1, min(shared, len(encoding.ids) - 1))
    new_tokens = len(encoding.ids) - seam
    most_context = max(1, longest - new_tokens)
    end = encoding.offsets[seam - 1][1]
    start = encoding.offsets[seam - most_context][0] if seam > most_context else 0
    return text[start:end], text[end:], new_tokens
