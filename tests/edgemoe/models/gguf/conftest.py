"""Tiny checkpoints and the GGUF files of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from edgemoe.models.loading import quiet_transformers
from edgemoe.models.tiny import tiny_config, tiny_model

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from transformers import PreTrainedModel

DENSE = ("llama", "qwen2", "qwen3")


def make_source(family: str, folder: Path, **changes: Any) -> PreTrainedModel:
    """Write a tiny checkpoint in the published layout and return its model."""
    changes = {"vocab_size": 272, "num_hidden_layers": 2, **changes}
    if family in DENSE:
        config = CONFIG_MAPPING[family](
            hidden_size=64,
            intermediate_size=96,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=256,
            initializer_range=0.2,
            **changes,
        )
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).float().eval()
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.data += 0.1 * torch.randn_like(parameter)
    else:
        model = tiny_model(tiny_config(family, **changes))
    with quiet_transformers():
        model.save_pretrained(folder)
    return model.eval()


def logits_of(model: Any, length: int = 96) -> torch.Tensor:
    """Run a model over the same random tokens."""
    ids = torch.randint(3, 259, (2, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits
    return found


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Any]]:
    """Make sources of families, each once."""
    known: dict[str, tuple[Path, Any]] = {}

    def source(family: str, **changes: Any) -> tuple[Path, Any]:
        key = f"{family} {sorted(changes.items())}"
        if key not in known:
            folder = tmp_path_factory.mktemp("source")
            known[key] = (folder, make_source(family, folder, **changes))
        return known[key]

    return source
