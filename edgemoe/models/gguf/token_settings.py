"""What a GGUF file says of its special tokens and its chat template. No tokenizer is built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgemoe.errors import CheckpointError
from edgemoe.models.gguf.pre_tokenizer_names import ADDING_BOS, NAMES

if TYPE_CHECKING:
    from edgemoe.models.gguf.container import Container

PREFIX = "tokenizer.ggml."
_SPECIAL = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
# Each of these ends an answer (llama.cpp's "end of generation").
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
_TEMPLATE = "tokenizer.chat_template"


# What is read here and by `edgemoe.models.gguf.tokens`.
USED = (
    _TEMPLATE,
    *(
        f"{PREFIX}{name}"
        for name in (
            *_SPECIAL.values(), *_ENDS, "model", "pre", "tokens", "token_type", "scores",
            "merges", "add_bos_token", "add_eos_token", "add_space_prefix",
            "remove_extra_whitespaces",
        )
    ),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TokenSettings:
    """What a file says of its special tokens.

    Attributes:
        config: Content of tokenizer_config.json.
        ids: Ids of special tokens, for config.json and generation_config.json.
        chat_template: The template; None where there is none.
    """

    config: dict[str, Any]
    ids: dict[str, Any]
    chat_template: str | None


def read_key(container: Container, key: str, kind: type, default: Any) -> Any:
    """Read a key of the tokenizer.

    Args:
        container: The file's header.
        key: Its name behind `tokenizer.ggml.`.
        kind: Its type.
        default: What it is where the file does not say.

    Returns:
        The value.

    Raises:
        CheckpointError: It is of another type.
    """
    found = container.metadata.get(f"{PREFIX}{key}", default)
    if found is not default and type(found) is not kind:
        raise CheckpointError(
            f"{PREFIX}{key} must be of type {kind.__name__}, got {found!r:.60} in "
            f"{container.path}. Download it again."
        )
    return found


def token_of(container: Container, key: str) -> str | None:
    """Read the token that a key names.

    Args:
        container: The file's header.
        key: Its name behind `tokenizer.ggml.`.

    Returns:
        The token; None where the file does not say.

    Raises:
        CheckpointError: There is no such token.
    """
    index = read_key(container, key, int, None)
    if index is None:
        return None
    tokens = read_key(container, "tokens", list, [])
    if not 0 <= index < len(tokens):
        raise CheckpointError(
            f"{PREFIX}{key} must be one of {len(tokens)} tokens, got {index} in "
            f"{container.path}. Download it again."
        )
    return str(tokens[index])


def adds_bos(container: Container) -> bool:
    """Return whether a token stands before each text; as llama.cpp takes it where none says.

    Args:
        container: The file's header.

    Returns:
        Whether it does.

    Raises:
        CheckpointError: The file says so and does not name the token.
    """
    kind = read_key(container, "model", str, "")
    usual = kind == "llama" or read_key(container, "pre", str, "") in ADDING_BOS
    added = bool(read_key(container, "add_bos_token", bool, usual))
    if added and token_of(container, "bos_token_id") is None:
        raise CheckpointError(
            f"a GGUF that adds a token before a text must name it, got no {PREFIX}bos_token_id "
            f"in {container.path}. Convert it again."
        )
    return added


def token_settings(container: Container) -> TokenSettings:
    """Read what a file says of its special tokens.

    Args:
        container: The file's header.

    Returns:
        What it says.

    Raises:
        CheckpointError: It contradicts itself, or its vocabulary is of a kind that is not read.
    """
    _check_kind(container)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": adds_bos(container),
        "clean_up_tokenization_spaces": False,
    }
    for name, key in _SPECIAL.items():
        token = token_of(container, key)
        if token is not None:
            config[name] = token
    ends = [read_key(container, key, int, None) for key in _ENDS if token_of(container, key)]
    found = list(dict.fromkeys(ends))
    ids: dict[str, Any] = {
        "bos_token_id": read_key(container, "bos_token_id", int, None),
        "pad_token_id": read_key(container, "padding_token_id", int, None),
        "eos_token_id": found[0] if len(found) == 1 else found or None,
    }
    template = container.metadata.get(_TEMPLATE)
    return TokenSettings(
        config=config,
        ids=ids,
        chat_template=template if isinstance(template, str) else None,
    )


def _check_kind(container: Container) -> None:
    kind = read_key(container, "model", str, "")
    if kind not in ("gpt2", "llama"):
        raise CheckpointError(
            f"{PREFIX}model must be gpt2 (byte-level BPE) or llama (SentencePiece BPE), got "
            f"{kind!r:.40} in {container.path}. Use the Hugging Face checkpoint that it was "
            "made from."
        )
    name = read_key(container, "pre", str, "")
    if kind == "gpt2" and name not in NAMES:
        raise CheckpointError(
            f"{PREFIX}pre must name how text is split (such as {', '.join(NAMES[:8])}), got "
            f"{name!r:.40} in {container.path}. Use the Hugging Face checkpoint that it was "
            "made from."
        )
    for key in ("remove_extra_whitespaces", "add_eos_token"):
        if read_key(container, key, bool, False):
            raise CheckpointError(
                f"{PREFIX}{key} must be false, got true in {container.path}: edgemoe's "
                "tokenizer does not do this. Use the Hugging Face checkpoint that it was made "
                "from."
            )
    tokens = read_key(container, "tokens", list, [])
    types = read_key(container, "token_type", list, [1] * len(tokens))
    if not tokens or len(types) != len(tokens) or {type(token) for token in tokens} != {str}:
        raise CheckpointError(
            f"{container.path} must list its vocabulary in {PREFIX}tokens and a type of each, "
            f"got {len(tokens)} tokens and {len(types)} types. Download it again."
        )
