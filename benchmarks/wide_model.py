"""A random model whose experts dominate, and lines for it: what speed is measured on."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING, Any

import click

from edgemoe.models.checkpoint import read_shape
from edgemoe.models.tiny import VOCAB_SIZE, write_tiny_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

_SIZES = {
    "hidden_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "moe_intermediate_size": 512,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 1024,
    # A spread as of trained models: with the wider one of tiny models, int4 answers otherwise.
    "initializer_range": 0.02,
}


def write_wide_model(work: Path, **sizes: float) -> tuple[Path, Path]:
    """Write the model and a task file of random words, unless that was done.

    Args:
        work: Folder for both.
        sizes: Entries of the configuration that are to be others: hidden size 1024, 8 layers
            of 16 experts of 512 neurons, top-4.

    Returns:
        The checkpoint and the task file.
    """
    model, lines = work / "wide", work / "wide.jsonl"
    if not model.exists():
        changes: dict[str, Any] = {**_SIZES, **sizes}
        write_tiny_checkpoint("qwen3_moe", model, **changes)
    experts = set(read_shape(model).experts_per_layer)
    if experts != {_SIZES["num_experts"]}:
        raise click.ClickException(
            f"{model} must have {_SIZES['num_experts']} experts per layer, got {experts}. Give "
            "another --work."
        )
    draw = random.Random(0)
    texts = [
        " ".join(f"w{draw.randrange(3, VOCAB_SIZE)}" for _ in range(64)) for _ in range(48)
    ]
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return model, lines
