"""Open a checkpoint's tokenizer with the library that the runtime uses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgemoe.errors import CheckpointError
from edgemoe.models.gguf.reading import open_gguf
from edgemoe_runtime.input_files import require_regular

if TYPE_CHECKING:
    from pathlib import Path

    from tokenizers import Tokenizer


def open_tokenizer(path: Path) -> Tokenizer:
    """Open the tokenizer of a checkpoint.

    Args:
        path: A directory or a GGUF file.

    Returns:
        The tokenizer, without truncation or padding.

    Raises:
        CheckpointError: tokenizer.json is missing or malformed.
    """
    from tokenizers import Tokenizer

    file = path / "tokenizer.json"
    gguf = open_gguf(path)
    if gguf is None and not file.exists():
        raise CheckpointError(
            f"a checkpoint must have tokenizer.json, got none in {path}. Copy it from the "
            "original model, or write it with "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...)."
        )
    try:
        if gguf is None:
            require_regular(file)
            tokenizer = Tokenizer.from_file(str(file))
        else:
            tokenizer = Tokenizer.from_str(gguf.settings["tokenizer.json"].decode("utf-8"))
    except CheckpointError:
        raise
    except Exception as error:  # the library raises Exception itself
        raise CheckpointError(
            f"{file} must be a tokenizer of the tokenizers library, got: {error}. Copy it "
            "again."
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
