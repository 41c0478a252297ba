"""A GGUF model as the parts of a Hugging Face checkpoint."""

from __future__ import annotations

import json
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from edgemoe.errors import CheckpointError, FamilyError
from edgemoe.models.gguf.architectures import NAMES, find_architecture
from edgemoe.models.gguf.config import read_config
from edgemoe.models.gguf.container import read_container
from edgemoe.models.gguf.decoding import check_types, dtype_name
from edgemoe.models.gguf.metadata import Metadata
from edgemoe.models.gguf.paths import find_gguf
from edgemoe.models.gguf.rules import Sizes, is_unused
from edgemoe.models.gguf.token_settings import USED, token_settings
from edgemoe.models.gguf.tokens import make_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from edgemoe.models.gguf.architectures import Architecture
    from edgemoe.models.gguf.container import Container
    from edgemoe.models.stored_tensors import StoredTensor

# From the source's generation_config.json; what else llama.cpp keeps of it is its own.
_SAMPLING = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_k": "top_k",
    "general.sampling.top_p": "top_p",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}
# What each file has, and what says how it is stored.
_STRUCTURE = (
    "general.architecture",
    "general.alignment",
    "general.quantization_version",
    "general.type",
    "split.no",
    "split.count",
    "split.tensors.count",
)


class GgufModel:
    """A GGUF model as a Hugging Face checkpoint would hold it; parts are made when asked for.

    Attributes:
        container: Its header.
        config: Content of config.json.
        architecture: How it is read.
    """

    def __init__(self, container: Container) -> None:
        """Understand a header; no weight is read.

        Args:
            container: The header.

        Raises:
            CheckpointError: The file says what the family does not compute with.
            FamilyError: The architecture is not supported.
        """
        self.container = container
        metadata = Metadata(container)
        kind = container.metadata.get("general.type", "model")
        if kind != "model":
            raise CheckpointError(
                f"a GGUF must be of a model, got general.type {kind!r:.50} in "
                f"{container.path}. Name the file of the language model."
            )
        architecture = find_architecture(metadata)
        if architecture is None:
            raise FamilyError(
                "a GGUF must be of an architecture that edgemoe reads "
                f"({', '.join(NAMES)}), got {container.architecture!r:.60} in "
                f"{container.path}. Use the Hugging Face checkpoint that it was made from."
            )
        self.architecture: Architecture = architecture
        check_types(container.blocks.values())
        tokens = token_settings(container)
        self.config: dict[str, Any] = {
            **read_config(metadata, architecture),
            **tokens.ids,
            **_of_blocks(container),
        }
        metadata.take("vocab_size", int, 0)  # compared with the embedding before
        metadata.finish()
        self._tokens = tokens
        self._told = metadata.left_out

    @property
    def files(self) -> list[Path]:
        """Its files."""
        return list(self.container.files)

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """Its tensors by their names in a Hugging Face checkpoint."""
        from edgemoe.models.gguf.tensors import name_tensors

        config = self.config
        sizes = Sizes(
            heads=config["num_attention_heads"], kv_heads=config["num_key_value_heads"]
        )
        rules, layers = self.architecture.rules, config["num_hidden_layers"]
        return name_tensors(self.container, rules, layers, sizes)

    @cached_property
    def settings(self) -> dict[str, bytes]:
        """Small files of the checkpoint by name: `config.json`, `tokenizer.json`, ..."""
        tokens, metadata = self._tokens, self.container.metadata
        sampling = {name: metadata[key] for key, name in _SAMPLING.items() if key in metadata}
        generation = {**tokens.ids, **sampling, **({"do_sample": True} if sampling else {})}
        found = {
            "config.json": _encode(self.config),
            "generation_config.json": _encode(generation),
            "tokenizer.json": make_tokenizer(self.container).encode("utf-8"),
            "tokenizer_config.json": _encode(tokens.config),
        }
        if tokens.chat_template is not None:
            found["chat_template.jinja"] = tokens.chat_template.encode("utf-8")
        return found

    def read(self, name: str) -> bytes | None:
        """Read a small file of the checkpoint.

        Args:
            name: Its name.

        Returns:
            Its content; None where the file says nothing of the kind.
        """
        # A tokenizer takes a second, which whoever asks for the configuration need not wait.
        return _encode(self.config) if name == "config.json" else self.settings.get(name)

    @property
    def stored_bytes(self) -> dict[str, int]:
        """Bytes of its tensors by ggml's type, such as `Q4_K`."""
        found: dict[str, int] = {}
        for block in self.container.blocks.values():
            found[block.type_name] = found.get(block.type_name, 0) + block.nbytes
        return found

    @property
    def left_out(self) -> tuple[str, ...]:
        """Keys and tensors that nothing is computed with, by name."""
        prefix = f"{self.container.architecture}."
        own = {*_SAMPLING, *_STRUCTURE, *USED}
        keys = [
            key
            for key in self.container.metadata
            if key not in own and not key.startswith(prefix)
        ]
        layers = self.config["num_hidden_layers"]
        unused = [name for name in self.container.blocks if is_unused(name, layers)]
        return (*sorted(keys), *self._told, *unused)


def open_gguf(path: Path) -> GgufModel | None:
    """Open a GGUF model; no weight is read, and the same file is not read again.

    Args:
        path: A `.gguf` file, any part of a split one, or a folder that holds one.

    Returns:
        The model; None where the path is no GGUF checkpoint.

    Raises:
        CheckpointError: A file is broken, or says what the family does not compute with.
        FamilyError: The architecture is not supported.
    """
    files = find_gguf(path)
    if files is None:
        return None
    stamps = []
    for file in files:
        status = file.stat()
        stamps.append((file, status.st_size, status.st_mtime_ns, status.st_ino))
    return _open(tuple(stamps))


@lru_cache(maxsize=4)
def _open(stamps: tuple[tuple[Path, int, int, int], ...]) -> GgufModel:
    return GgufModel(read_container([file for file, *_ in stamps]))


def _of_blocks(container: Container) -> dict[str, Any]:
    embedding = container.blocks.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(
            f"{container.path} must hold token_embd.weight [vocabulary, hidden], got "
            f"{embedding and embedding.shape}. Download it again."
        )
    words = embedding.shape[0]
    said = container.metadata.get(f"{container.architecture}.vocab_size", words)
    listed = len(container.metadata["tokenizer.ggml.tokens"])
    if said != words or listed > words:
        raise CheckpointError(
            f"{container.path} must name one size of the vocabulary, got {said!r:.20} in "
            f"vocab_size, {listed} tokens and {words} rows of token_embd. Convert it again."
        )
    sizes: dict[str, int] = {}
    for block in container.blocks.values():
        name = dtype_name(block)
        sizes[name] = sizes.get(name, 0) + block.nbytes
    return {
        "vocab_size": words,
        "tie_word_embeddings": "output.weight" not in container.blocks,
        "dtype": max(sizes, key=sizes.__getitem__),
    }


def _encode(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode("utf-8")
