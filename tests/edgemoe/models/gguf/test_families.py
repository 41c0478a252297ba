"""A GGUF of each architecture gives the logits of the checkpoint that it was made from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gguf
import pytest
import torch

from edgemoe.carve.dense import load_dense
from edgemoe.models.checkpoint import Checkpoint, load_model
from edgemoe.models.opening import open_streamed
from tests.edgemoe.models.gguf.conftest import DENSE, logits_of
from tests.edgemoe.models.gguf.writing import ARCHITECTURES, write_gguf

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
_CHANGES: dict[str, dict[str, Any]] = {
    # llama.cpp's script does not write a window for these: the format has no place for it.
    "mixtral": {"sliding_window": None},
    "dots1": {"sliding_window": None},
    "qwen3_moe": {"norm_topk_prob": True},
    "granitemoe": {"logits_scaling": 2.0, "attention_multiplier": 0.3},
    "granitemoeshared": {"residual_multiplier": 0.5, "embedding_multiplier": 3.0},
    "deepseek_v2": {
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 2.0,
        "rope_parameters": {**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
    },
    "deepseek_v3": {"rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0}},
    "glm4_moe": {"use_qk_norm": True, "attention_bias": True},
    "minimax_m2": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        }
    },
    "phimoe": {
        "attention_bias": True,
        "lm_head_bias": True,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0 + 0.1 * index for index in range(8)],
            "long_factor": [2.0 + index for index in range(8)],
            "original_max_position_embeddings": 128,
            "attention_factor": 1.1,
            "short_mscale": 1.1,
            "long_mscale": 1.1,
        },
    },
}
_FAST = ("llama", "mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss")


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=() if family in _FAST else pytest.mark.slow)
        for family in ARCHITECTURES
    ],
)
def test_a_file_in_float32_gives_the_logits_of_its_source(
    family: str, sources: Callable[..., tuple[Path, Any]], tmp_path: Path
) -> None:
    folder, model = sources(family, **_CHANGES.get(family, {}))
    file = write_gguf(folder, tmp_path / "model.gguf")
    want = logits_of(model)
    got = logits_of(load_dense(file).model if family in DENSE else load_model(file).model)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert Checkpoint(file).config.model_type == family


def test_quantised_experts_are_what_gguf_dequantises_whole_and_streamed(
    sources: Callable[..., tuple[Path, Any]], tmp_path: Path
) -> None:
    folder, _ = sources("mixtral", **_CHANGES["mixtral"])
    kinds = gguf.GGMLQuantizationType

    def store(name: str) -> gguf.GGMLQuantizationType | None:
        if "_exps" in name:
            return kinds.Q8_0 if "down" in name else kinds.Q4_0
        return kinds.F16 if "attn_v" in name else None

    file = write_gguf(folder, tmp_path / "model.gguf", store=store)
    reader = gguf.GGUFReader(file)
    stored = {one.name: gguf.dequantize(one.data, one.tensor_type) for one in reader.tensors}
    whole = load_model(file).model.state_dict()
    gate_up = whole["model.layers.1.mlp.experts.gate_up_proj"].numpy()
    width = gate_up.shape[1] // 2
    assert (gate_up[:, :width] == stored["blk.1.ffn_gate_exps.weight"]).all()
    assert (gate_up[:, width:] == stored["blk.1.ffn_up_exps.weight"]).all()
    down = whole["model.layers.0.mlp.experts.down_proj"].numpy()
    assert (down == stored["blk.0.ffn_down_exps.weight"]).all()
    skeleton = open_streamed(file).skeleton
    for name, tensor in whole.items():
        assert torch.equal(skeleton.read(name), tensor), name


def test_mxfp4_of_gpt_oss_is_what_gguf_dequantises(
    sources: Callable[..., tuple[Path, Any]], tmp_path: Path
) -> None:
    folder, _ = sources("gpt_oss")
    kind = gguf.GGMLQuantizationType.MXFP4
    file = write_gguf(
        folder,
        tmp_path / "model.gguf",
        store=lambda name: kind if name.endswith("_exps.weight") else None,
    )
    reader = gguf.GGUFReader(file)
    stored = {one.name: gguf.dequantize(one.data, one.tensor_type) for one in reader.tensors}
    found = load_model(file).model.state_dict()
    gate_up = found["model.layers.1.mlp.experts.gate_up_proj"].numpy()
    assert (gate_up[..., ::2].swapaxes(1, 2) == stored["blk.1.ffn_gate_exps.weight"]).all()
    assert (gate_up[..., 1::2].swapaxes(1, 2) == stored["blk.1.ffn_up_exps.weight"]).all()


_ROPES: dict[str, dict[str, Any]] = {
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    # No other number is stored than divisors, so these bounds come back as a list of them.
    "longrope": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                 "high_freq_factor": 2.0, "original_max_position_embeddings": 64},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {**_YARN, "beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.3},
}  # fmt: skip


@pytest.mark.parametrize("kind", _ROPES)
def test_scaled_positions_are_those_of_the_source(
    kind: str, sources: Callable[..., tuple[Path, Any]], tmp_path: Path
) -> None:
    rope = {"rope_theta": 10000.0, **_ROPES[kind]}
    folder, model = sources("llama", rope_parameters=rope)
    found = load_dense(write_gguf(folder, tmp_path / "model.gguf")).model
    assert found.config.rope_parameters["rope_type"] == kind
    torch.testing.assert_close(logits_of(found), logits_of(model), rtol=0, atol=1e-5)
    if kind == "llama3":
        assert found.config.rope_parameters.items() >= rope.items()
