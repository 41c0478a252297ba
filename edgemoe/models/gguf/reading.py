"""A GGUF model as the parts of a Hugging Face checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from edgemoe.errors import CheckpointError, FamilyError
from edgemoe.models.gguf.architectures import NAMES, find_architecture
from edgemoe.models.gguf.container import read_container
from edgemoe.models.gguf.decoding import check_types
from edgemoe.models.gguf.metadata import Metadata
from edgemoe.models.gguf.paths import find_gguf
from edgemoe.models.gguf.rope import rope_parameters
from edgemoe.models.gguf.rules import Sizes
from edgemoe.models.gguf.tensors import name_tensors
from edgemoe.models.gguf.tokens import read_tokens

if TYPE_CHECKING:
    from pathlib import Path

    from edgemoe.models.gguf.architectures import Architecture
    from edgemoe.models.gguf.container import Container
    from edgemoe.models.stored_tensors import StoredTensor

_COMMON = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
}
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


@dataclass(frozen=True, kw_only=True)
class GgufModel:
    """A GGUF model as a Hugging Face checkpoint would hold it.

    Attributes:
        files: Its files.
        architecture: llama.cpp's name of its architecture.
        settings: Small files of the checkpoint by name: `config.json`, `tokenizer.json`, ...
        tensors: Its tensors by their names in the checkpoint.
        stored_bytes: Bytes of its tensors by ggml's type, such as `Q4_K`.
        left_out: Keys and tensors that nothing is computed with, by name.
    """

    files: tuple[Path, ...]
    architecture: str
    settings: dict[str, bytes]
    tensors: dict[str, StoredTensor]
    stored_bytes: dict[str, int]
    left_out: tuple[str, ...]


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
    container = read_container([file for file, *_ in stamps])
    metadata = Metadata(container)
    kind = container.metadata.get("general.type", "model")
    if kind != "model":
        raise CheckpointError(
            f"a GGUF must be of a model, got general.type {kind!r:.50} in {container.path}. "
            "Name the file of the language model."
        )
    architecture = find_architecture(metadata)
    if architecture is None:
        raise FamilyError(
            f"a GGUF must be of an architecture that edgemoe reads ({', '.join(NAMES)}), got "
            f"{container.architecture!r:.60} in {container.path}. Use the Hugging Face "
            "checkpoint that the file was made from."
        )
    check_types(container.blocks.values())
    tokens = read_tokens(container)
    config = _config(metadata, architecture)
    config |= tokens.ids
    metadata.take("vocab_size", int, 0)  # compared with the embedding below
    metadata.finish()
    sizes = Sizes(heads=config["num_attention_heads"], kv_heads=config["num_key_value_heads"])
    layers = config["num_hidden_layers"]
    tensors, unused = name_tensors(container, architecture.rules, layers, sizes)
    config |= _of_tensors(container, tensors)
    stored: dict[str, int] = {}
    for block in container.blocks.values():
        stored[block.type_name] = stored.get(block.type_name, 0) + block.nbytes
    generation = {
        **tokens.ids,
        **{
            name: container.metadata[key]
            for key, name in _SAMPLING.items()
            if key in container.metadata
        },
    }
    if len(generation) > len(tokens.ids):
        generation["do_sample"] = True
    settings = {
        "config.json": config,
        "generation_config.json": generation,
        "tokenizer_config.json": tokens.config,
    }
    own = {*_SAMPLING, *_STRUCTURE, *tokens.used, f"{container.architecture}.vocab_size"}
    own |= {key for key in container.metadata if key.startswith(f"{container.architecture}.")}
    return GgufModel(
        files=container.files,
        architecture=container.architecture,
        settings={
            **{name: _encode(content) for name, content in settings.items()},
            "tokenizer.json": tokens.tokenizer.encode("utf-8"),
            **(
                {}
                if tokens.chat_template is None
                else {"chat_template.jinja": tokens.chat_template.encode("utf-8")}
            ),
        },
        tensors=tensors,
        stored_bytes=stored,
        left_out=(*sorted(set(container.metadata) - own), *metadata.left_out, *unused),
    )


def _config(metadata: Metadata, architecture: Architecture) -> dict[str, Any]:
    found: dict[str, Any] = {entry: metadata.take(key, int) for key, entry in _COMMON.items()}
    heads = found["num_attention_heads"]
    if min(found.values()) < 1:
        raise CheckpointError(
            f"{metadata.container.path} must say sizes above 0, got {found}. Download it again."
        )
    layers = metadata.take("block_count", int)
    predicted = metadata.take("nextn_predict_layers", int, 0)
    size = metadata.take("attention.key_length", int, found["hidden_size"] // heads)
    found |= {
        "model_type": architecture.model_type,
        # Layers that predict later tokens are counted by llama.cpp, not by transformers.
        "num_hidden_layers": layers - predicted,
        "intermediate_size": metadata.take("feed_forward_length", int, 0),
        "num_key_value_heads": metadata.take("attention.head_count_kv", int, heads),
        "rms_norm_eps": metadata.take(
            "attention.layer_norm_rms_epsilon",
            float,
            metadata.take("attention.layer_norm_epsilon", float, None),
        ),
    }
    if found["rms_norm_eps"] is None:
        metadata.take("attention.layer_norm_rms_epsilon", float)
    turned = metadata.take("rope.dimension_count", int, size)
    own = architecture.read(metadata)
    if "kv_lora_rank" not in own:
        metadata.expect("attention.value_length", size)
        if architecture.rotary == "all":
            metadata.expect("rope.dimension_count", size)
    if architecture.head_dim is not None:
        found[architecture.head_dim] = size
    elif "kv_lora_rank" not in own:
        metadata.expect("attention.key_length", found["hidden_size"] // heads)
    rope = rope_parameters(metadata, turned)
    if architecture.rotary == "some":
        rope["partial_rotary_factor"] = turned / size
    if architecture.model_type == "gpt_oss" and rope["rope_type"] == "yarn":
        # The family does not round the bounds of the ramp; no key says so.
        rope["truncate"] = False
    if architecture.model_type == "phimoe" and rope["rope_type"] == "longrope":
        rope |= dict.fromkeys(("short_mscale", "long_mscale"), rope["attention_factor"])
    return {**found, "rope_parameters": rope, **own}


def _of_tensors(container: Container, tensors: dict[str, StoredTensor]) -> dict[str, Any]:
    embedding = tensors.get("model.embed_tokens.weight")
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
    sizes: dict[torch.dtype, int] = {}
    for tensor in tensors.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    return {
        "vocab_size": words,
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "dtype": str(max(sizes, key=sizes.__getitem__)).removeprefix("torch."),
    }


def _encode(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode("utf-8")
