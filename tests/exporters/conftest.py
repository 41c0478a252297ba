"""Tiny random models of every family, each traced once; a checkpoint and two tasks."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    MixtralConfig,
    Qwen2MoeConfig,
)

from edgemoe.decompose.shared_basis import share_basis
from edgemoe.models.adapter import adapt_model
from edgemoe.models.layers.shared_basis import to_shared_basis
from edgemoe_exporters import graph_making
from edgemoe_exporters.tracing.trace import trace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import onnx_ir as ir

    from edgemoe.models.contract import MoeModel
    from edgemoe_exporters.lowering.quantize import Quantized

    Array = np.ndarray[Any, Any]

_COMMON = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
}

_CONFIGS = {
    # The first layer dense, the others of different sizes, and all that attention may have.
    "glm4_moe": Glm4MoeConfig(
        **_COMMON,
        num_hidden_layers=3,
        first_k_dense_replace=1,
        head_dim=16,
        moe_intermediate_size=32,
        n_shared_experts=2,
        n_routed_experts=8,
        n_group=1,
        topk_group=1,
        norm_topk_prob=False,
        routed_scaling_factor=2.5,
        attention_bias=True,
        use_qk_norm=True,
        partial_rotary_factor=0.5,
        tie_word_embeddings=True,
    ),
    "qwen2_moe": Qwen2MoeConfig(
        **_COMMON,
        num_hidden_layers=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=64,
        num_experts=8,
        norm_topk_prob=False,
    ),
    # Experts in groups, weights divided by their sum.
    "grouped": Glm4MoeConfig(
        **_COMMON,
        num_hidden_layers=1,
        first_k_dense_replace=0,
        head_dim=16,
        moe_intermediate_size=32,
        n_shared_experts=1,
        n_routed_experts=12,
        n_group=4,
        topk_group=2,
        norm_topk_prob=True,
        routed_scaling_factor=1.5,
    ),
    "mixtral": MixtralConfig(**_COMMON, num_hidden_layers=2, num_local_experts=6),
    "based": MixtralConfig(**_COMMON, num_hidden_layers=2, num_local_experts=6),
    "windowed": MixtralConfig(
        **_COMMON, num_hidden_layers=2, num_local_experts=6, sliding_window=4
    ),
}


@dataclass
class Traced:
    """A model and its traced graph."""

    model: Any
    graph: Any


@pytest.fixture(scope="session")
def traced_models() -> Any:
    """Return a function from a family to its traced tiny model."""
    made = {}

    def get(family: Any) -> Any:
        if family not in made:
            made[family] = _trace(family)
        return made[family]

    return get


def _trace(family: Any) -> Any:
    torch.manual_seed(0)
    model = adapt_model(AutoModelForCausalLM.from_config(_CONFIGS[family]).float())
    with torch.no_grad():
        for name, parameter in model.model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    if family == "grouped":
        bias = model.layers[0].correction_bias
        assert bias is not None
        bias.normal_(std=0.1)
    if family == "based":
        first = model.layers[0]
        to_shared_basis(first, share_basis(first, 32).tensors)
    if family == "glm4_moe":
        last: Any = model.layers[-1]
        last.correction_bias.normal_(std=0.1)
        last.keep(range(6))
    return Traced(model, trace(model))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = Glm4MoeConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=2,
        first_k_dense_replace=0,
        norm_topk_prob=False,
        routed_scaling_factor=2.0,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    path = tmp_path_factory.mktemp("checkpoint") / "tiny"
    Glm4MoeForCausalLM(config).save_pretrained(path)
    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(96)}, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="session")
def write_task() -> Callable[..., Path]:
    """A function that writes a task file of words from a range of the vocabulary."""

    def write(path: Path, low: int, high: int, lines: int = 12) -> Path:
        draw = np.random.default_rng(low)
        texts = [" ".join(f"w{i}" for i in draw.integers(low, high, 20)) for _ in range(lines)]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return path

    return write


@pytest.fixture(scope="session")
def tasks(
    tmp_path_factory: pytest.TempPathFactory, write_task: Callable[..., Path]
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tasks")
    return {
        "low": write_task(folder / "low.jsonl", 3, 40),
        "high": write_task(folder / "high.jsonl", 50, 90),
    }


@pytest.fixture(scope="module")
def one_trace() -> Iterator[None]:
    """Tracing is most of an export, and a graph does not depend on weights."""
    traces: dict[object, ir.Model] = {}

    def trace_once(model: MoeModel) -> ir.Model:
        key = (model.family, tuple(layer.is_factored for layer in model.layers))
        if key not in traces:
            traces[key] = trace(model)
        return traces[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph_making, "trace", trace_once)
        yield


@pytest.fixture(scope="session")
def dequantize_blocks() -> Callable[[Quantized, int], Array]:
    """A function that undoes `quantize_blocks`: float32 `[..., rows, columns]`."""

    def unpack(packed: Array, bits: int) -> Array:
        if bits == 8:
            return packed
        pairs = np.stack([packed & 15, packed >> 4], axis=-1)
        return pairs.reshape(*packed.shape[:-1], -1)

    def dequantize(quantized: Quantized, bits: int) -> Array:
        levels = unpack(quantized.packed, bits).astype(np.float32)
        scales = quantized.scales
        blocks = levels.reshape(*scales.shape, -1)
        if quantized.zero_points is None:
            zeros = np.full(scales.shape, 1 << (bits - 1), dtype=np.float32)
        else:
            zeros = unpack(quantized.zero_points, bits)[..., : scales.shape[-1]]
            zeros = zeros.astype(np.float32)
        values: Array = (blocks - zeros[..., None]) * scales[..., None]
        return values.reshape(levels.shape)

    return dequantize
