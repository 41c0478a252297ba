"""A random checkpoint of the shape of Qwen1.5-MoE-A2.7B as hubs store it, and a task."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers.core_model_loading import dot_natural_key, revert_weight_conversion

from edgemoe.models.weights.shards import PlannedTensor, ShardWriter, lay_out, write_index

if TYPE_CHECKING:
    from pathlib import Path

_WORDS = 20_000
_LINE_TOKENS = 512


def write_checkpoint(path: Path, layers: int, shard_bytes: int) -> int:
    """Write the random checkpoint tensor by tensor.

    Args:
        path: Directory to make.
        layers: Decoder layers.
        shard_bytes: Largest file.

    Returns:
        Bytes of its weights.
    """
    config = transformers.Qwen2MoeConfig(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        max_position_embeddings=8192,
        moe_intermediate_size=1408,
        shared_expert_intermediate_size=5632,
        num_experts=60,
        num_experts_per_tok=4,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    config.architectures = ["Qwen2MoeForCausalLM"]
    with torch.device("meta"):
        model = transformers.Qwen2MoeForCausalLM(config)
    shapes = revert_weight_conversion(model, model.state_dict())
    planned = [
        PlannedTensor(name=name, dtype=torch.bfloat16, shape=tuple(shape.shape), layer=None)
        for name, shape in sorted(shapes.items(), key=lambda item: dot_natural_key(item[0]))
    ]
    path.mkdir(parents=True)
    config.save_pretrained(path)
    shards = lay_out(planned, shard_bytes)
    generator = torch.Generator().manual_seed(0)
    for shard in shards:
        with (path / shard.name).open("wb") as stream:
            writer = ShardWriter(stream, shard)
            for tensor in shard.tensors:
                content = torch.empty(tensor.shape, dtype=torch.float32)
                content.normal_(std=0.02, generator=generator)
                if tensor.name.endswith("norm.weight"):
                    content.fill_(1)
                writer.write(tensor, content.to(torch.bfloat16))
    write_index(shards, path)
    write_word_tokenizer(path, _WORDS)
    return sum(shard.nbytes for shard in shards)


def write_word_tokenizer(path: Path, words: int) -> None:
    """Write a tokenizer whose tokens are the words w0, w1, and so on.

    Args:
        path: Checkpoint directory.
        words: Their number.
    """
    vocabulary = {f"w{index}": index for index in range(words)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=next(iter(vocabulary))))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(path / "tokenizer.json"))


def write_task(path: Path, tokens: int) -> None:
    """Write lines of random words.

    Args:
        path: Task file.
        tokens: Their number.
    """
    generator = torch.Generator().manual_seed(1)
    with path.open("w", encoding="utf-8") as stream:
        for _ in range(max(1, tokens // _LINE_TOKENS)):
            ids = torch.randint(_WORDS, (_LINE_TOKENS,), generator=generator)
            stream.write(json.dumps({"text": " ".join(f"w{i}" for i in ids.tolist())}) + "\n")
