from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from edgemoe.models.registry import find_family

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

VOCAB_SIZE = 96
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    # A larger spread than the default makes routing differ between tokens.
    "initializer_range": 0.3,
}
OF_FAMILY: dict[str, dict[str, Any]] = {
    "glm4_moe": {
        "n_routed_experts": 8,
        "moe_intermediate_size": 16,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "norm_topk_prob": False,
        "routed_scaling_factor": 2.0,
    },
    "qwen2_moe": {
        "num_experts": 8,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "mlp_only_layers": [1],
    },
    "mixtral": {"num_local_experts": 8, "intermediate_size": 16},
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Any]:
    """A function from a family and configuration entries to a random transformers model."""

    def make(family: str, *, seed: int = 0, **changes: Any) -> Any:
        causal_lm: Any = find_family(family).causal_lm
        config = causal_lm.config_class(**{**COMMON, **OF_FAMILY[family], **changes})
        torch.manual_seed(seed)
        model = causal_lm(config).eval()
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.2)
        return model

    return make


@pytest.fixture
def make_checkpoint(make_model: Callable[..., Any], tmp_path: Path) -> Callable[..., Path]:
    """A function from a family and configuration entries to a checkpoint directory."""

    def make(
        family: str,
        *,
        dtype: torch.dtype = torch.float32,
        max_shard_size: str = "5GB",
        **changes: Any,
    ) -> Path:
        path = tmp_path / f"{family}-{len(list(tmp_path.iterdir()))}"
        model = make_model(family, **changes).to(dtype)
        model.save_pretrained(path, max_shard_size=max_shard_size)
        words = {f"w{index}": index for index in range(VOCAB_SIZE)}
        tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
        tokenizer.pre_tokenizer = Whitespace()
        tokenizer.save(str(path / "tokenizer.json"))
        return path

    return make


@pytest.fixture(scope="session")
def token_ids() -> torch.Tensor:
    """Two rows of random tokens, int64 [2, 11]."""
    return torch.randint(0, VOCAB_SIZE, (2, 11), generator=torch.Generator().manual_seed(3))
