"""What `Session` is asked for, checked and in the terms of the tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgemoe_runtime.arguments import check_count, check_flag, check_text, check_texts
from edgemoe_runtime.decoding.generation import GenerationRequest
from edgemoe_runtime.decoding.sampling import Sampling
from edgemoe_runtime.decoding.stopping import check_stop
from edgemoe_runtime.errors import RequestError
from edgemoe_runtime.messages import quote

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from edgemoe_runtime.decoding.tokenizer import Tokenizer

DEFAULT_TEMPLATE = "{text}\nAnswer: "


def make_request(
    prompt: Sequence[int],
    tokenizer: Tokenizer,
    end_tokens: Collection[int],
    *,
    max_new_tokens: Any,
    temperature: Any,
    top_p: Any,
    top_k: Any,
    seed: Any,
    stop: Any,
    stream: Any,
) -> GenerationRequest:
    """Check the arguments of a generation.

    Args:
        prompt: token ids.
        tokenizer: of the bundle.
        end_tokens: tokens that end a text.
        max_new_tokens: as in `Session.generate`, and so are those below.
        temperature: as there.
        top_p: as there.
        top_k: as there.
        seed: as there.
        stop: as there; a string with special tokens in it matches by their ids.
        stream: as there.

    Returns:
        The request.

    Raises:
        RequestError: when one is of another type or out of range.
    """
    check_flag("stream", stream)
    texts = check_stop(stop)
    for text in texts:
        check_text("stop", text)
    sequences = {text: tokenizer.special_sequence(text) for text in texts}
    return GenerationRequest(
        prompt=tuple(prompt),
        max_new_tokens=check_count("max_new_tokens", max_new_tokens, 1),
        sampling=Sampling(temperature=temperature, top_k=top_k, top_p=top_p),
        seed=None if seed is None else check_count("seed", seed, 0),
        stop=tuple(text for text, sequence in sequences.items() if not sequence),
        stop_tokens=tuple(sequence for sequence in sequences.values() if sequence),
        eos_token_ids=frozenset(end_tokens),
    )


def make_prompt(text: Any, choices: Any, template: Any, by: Any) -> tuple[str, list[str]]:
    """Check the arguments of a classification.

    Args:
        text: as in `Session.classify`, and so are those below.
        choices: as there.
        template: as there.
        by: as there.

    Returns:
        The prompt, and the choices.

    Raises:
        RequestError: when one is of another type or out of range.
    """
    check_text("text", text)
    found = check_texts("choices", choices)
    if not found or "" in found or len(set(found)) != len(found):
        raise RequestError(
            f"choices must be a list of distinct, non-empty strings, got {quote(choices)}."
        )
    if by not in ("total", "token", "character"):
        raise RequestError(f"by must be total, token or character, got {quote(by, 80)}.")
    pattern = DEFAULT_TEMPLATE if template is None else check_text("template", template)
    if "{text}" not in pattern:
        raise RequestError(f"template must contain {{text}}, got {quote(pattern)}.")
    return pattern.replace("{text}", text), found
