"""Tokens that a model has no embedding for, found in task files before a model is loaded.

A tokenizer may have more entries than the embedding has rows: tokens that were added to it and
not to the model, or entries that nobody uses. Only one that occurs is a mistake.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from edgemoe.errors import TaskFileError
from edgemoe.small_files import read_once
from edgemoe.tasks import ChoiceRecord, CompletionRecord
from edgemoe_runtime.bundle.names import MANIFEST_FILE, TOKENIZER_FILE
from edgemoe_runtime.input_files import parse_strict, read_file
from edgemoe_runtime.messages import quote

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from tokenizers import Tokenizer

    from edgemoe.tasks import TaskFile, TaskRecord

_LOG = logging.getLogger("edgemoe.api")
# Parts of a configuration that describe the language model of a larger one.
_TEXT_CONFIGS = ("text_config", "llm_config", "language_config", "thinker_config")
_REMEDY = (
    "Take the token out of the text, use the tokenizer that the model was trained with, or add "
    "the rows with transformers' resize_token_embeddings and train them"
)


def read_vocabulary_size(model: Path) -> int | None:
    """Read how many tokens a checkpoint or a bundle has embeddings for.

    Args:
        model: Its directory.

    Returns:
        Rows of the embedding; None where no file says it.
    """
    try:
        if (model / MANIFEST_FILE).exists():
            found = parse_strict(read_file(model / MANIFEST_FILE)).get("model")
        else:
            found = parse_strict(read_once(model / "config.json"), infinities=True)
    except (OSError, ValueError, AttributeError):
        return None  # whoever opens the file says what is wrong with it
    return _size_of(found)


def check_tokens(model: Path, tasks: Sequence[TaskFile]) -> None:
    """Refuse task files with tokens that the model has no embedding for.

    Where the tokenizer has such tokens and none occurs, the logger `edgemoe.api` notes it.

    Args:
        model: Checkpoint directory or bundle.
        tasks: What it is to read.

    Raises:
        TaskFileError: A line has one; the message names line, token and id.
    """
    lines = (
        (text, f"{task.path}, line {record.line}")
        for task in tasks
        for record in task.records
        for text in _texts(record)
    )
    check_texts(model, lines)


def check_texts(model: Path, texts: Iterable[tuple[str, str]]) -> None:
    """Refuse texts with tokens that the model has no embedding for.

    Args:
        model: Checkpoint directory or bundle.
        texts: Each with where it stands.

    Raises:
        TaskFileError: As in `check_tokens`.
    """
    size = read_vocabulary_size(model)
    tokenizer = None if size is None else _open(model)
    if size is None or tokenizer is None:
        return
    beyond = {
        id_: token
        for token, id_ in tokenizer.get_vocab(with_added_tokens=True).items()
        if id_ >= size
    }
    if not beyond:
        return
    for text, where in texts:
        for id_ in tokenizer.encode(text).ids:
            if id_ in beyond:
                raise TaskFileError(
                    f"{where}: tokens must be among the {size} that the model has embeddings "
                    f"for, got {quote(beyond[id_], 80)}, which is token {id_}. {_REMEDY}."
                )
    _LOG.info(
        "note: the tokenizer has %d tokens more than the model has embeddings for (%d), such "
        "as %s; none of them occurs in the data.",
        len(beyond),
        size,
        quote(beyond[min(beyond)], 80),
    )


def _texts(record: TaskRecord) -> Iterator[str]:
    if isinstance(record, ChoiceRecord):
        yield from (record.prompt + choice for choice in record.choices)
    elif isinstance(record, CompletionRecord):
        yield record.prompt + record.completion
    else:
        yield record.text


def _size_of(config: Any) -> int | None:
    if not isinstance(config, dict):
        return None
    for name in _TEXT_CONFIGS:
        inner = _size_of(config.get(name))
        if inner is not None:
            return inner
    sizes = [config.get("vocab_size")]
    # Gemma 4 has a second table of tokens, which may be smaller.
    if config.get("hidden_size_per_layer_input"):
        sizes.append(config.get("vocab_size_per_layer_input"))
    known = [size for size in sizes if type(size) is int and size > 0]
    return min(known, default=None)


def _open(model: Path) -> Tokenizer | None:
    from tokenizers import Tokenizer

    file = model / TOKENIZER_FILE
    try:
        tokenizer = Tokenizer.from_str(read_file(file).decode("utf-8"))
    except Exception:  # whoever opens the model says what is wrong with it
        return None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
