from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
import transformers
from tokenizers import Tokenizer

from edgemoe.models.tiny import write_tiny_checkpoint

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the examples of docstrings name: two models and a task's examples."""
    folder = tmp_path_factory.mktemp("api")
    write_tiny_checkpoint("qwen2_moe", folder / "moe")
    words = np.random.default_rng(0).integers(0, 96, (40, 40))
    texts = [json.dumps({"text": " ".join(f"w{word}" for word in row)}) for row in words]
    (folder / "code.jsonl").write_text("\n".join(texts[:28]))
    (folder / "code.test.jsonl").write_text("\n".join(texts[28:]))
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "dense")
    tokenizer = Tokenizer.from_file(str(folder / "moe/tokenizer.json"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(
        folder / "dense"
    )
    return folder
