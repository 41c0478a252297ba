from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from edgemoe.carve.build import neuron_shares
from edgemoe.carve.carve import carve_checkpoint, rebuild_checkpoint
from edgemoe.carve.dense import load_dense
from edgemoe.carve.learned import LearnedCarve, pack_delta, weights_sha256
from edgemoe.carve.options import CarveOptions
from edgemoe.errors import CarveError, CheckpointError, OutputError

if TYPE_CHECKING:
    from pathlib import Path

WORDS = 90
SHAPE: dict[str, Any] = {
    "vocab_size": WORDS + 4,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
    "tie_word_embeddings": True,
}
OPTIONS = CarveOptions(experts=8, shared_fraction=1 / 3, top_k=3, max_tokens=2048)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    generator = np.random.default_rng(0)
    return [" ".join(f"w{i}" for i in generator.integers(WORDS, size=600)) for _ in range(6)]


def save_dense_checkpoint(directory: Path, model: Any) -> Path:
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "<x>": 3}
    vocabulary |= {f"w{i}": i + 4 for i in range(WORDS)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    model.save_pretrained(directory)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    fast.save_pretrained(directory)
    return directory


def random_dense(family: str = "llama", **changes: Any) -> Any:
    torch.manual_seed(0)
    config, causal_lm = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    }[family]
    model = causal_lm(config(**{**SHAPE, **changes})).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dense_checkpoint(tmp_path_factory.mktemp("dense") / "llama", random_dense())


def logits(checkpoint: Path) -> torch.Tensor:
    ids = torch.arange(4, 60)[None]
    with torch.no_grad():
        out: torch.Tensor = AutoModelForCausalLM.from_pretrained(checkpoint)(ids).logits
    return out


def digest(directory: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.iterdir())
    }


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_with_every_expert_the_carved_model_is_the_dense_one(
    family: str, tmp_path: Path, texts: list[str]
) -> None:
    source = save_dense_checkpoint(tmp_path / "dense", random_dense(family))
    options = CarveOptions(experts=8, top_k=8, max_tokens=2048)
    report = carve_checkpoint(source, tmp_path / "moe", texts=texts, options=options)
    assert report.active_fraction == 1.0
    assert (logits(tmp_path / "moe") - logits(source)).abs().max() < 2e-3
    assert logits(source).abs().max() > 1.0


def test_weights_that_are_only_moved_keep_their_type_and_other_programs_find_their_entries(
    tmp_path: Path, texts: list[str]
) -> None:
    stored = random_dense().to(torch.bfloat16)
    norms = {n for n, _ in stored.named_parameters() if "layernorm" in n}
    for name in norms:
        parent, _, leaf = name.rpartition(".")
        getattr(stored.get_submodule(parent), leaf).data = torch.rand(32)
    source = save_dense_checkpoint(tmp_path / "dense", stored)
    # Experts of four channels, which no product but that of float32 takes, and of eight.
    carve_checkpoint(source, tmp_path / "narrow", texts=texts, options=OPTIONS)
    narrow = load_file(tmp_path / "narrow" / "model.safetensors")
    assert {tensor.dtype for tensor in narrow.values()} == {torch.float32}
    options = CarveOptions(experts=4, shared_fraction=1 / 3, top_k=2, max_tokens=2048)
    carve_checkpoint(source, tmp_path / "moe", texts=texts, options=options)
    tensors = load_file(tmp_path / "moe" / "model.safetensors")
    wide = {name for name, tensor in tensors.items() if tensor.dtype == torch.float32}
    assert wide == norms | {
        f"model.layers.{n}.mlp.gate.{part}"
        for n in range(2)
        for part in ("weight", "e_score_correction_bias")
    }
    before = load_file(source / "model.safetensors")
    assert torch.equal(
        tensors["model.embed_tokens.weight"], before["model.embed_tokens.weight"]
    )
    rows = [t for n, t in tensors.items() if "layers.1.mlp" in n and "up_proj" in n]
    found = torch.cat([t.reshape(-1, 32) for t in rows]).sort(0).values
    assert torch.equal(found, before["model.layers.1.mlp.up_proj.weight"].sort(0).values)
    config = json.loads((tmp_path / "moe" / "config.json").read_text())
    # mlp_lm 0.32 has no defaults for these, or others.
    told = {"dtype", "torch_dtype", "n_routed_experts", "num_nextn_predict_layers"}
    told |= {"rope_theta", "rope_scaling", "partial_rotary_factor"}
    assert {name: config.get(name, "none") for name in told} == {
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        "n_routed_experts": 4,
        "num_nextn_predict_layers": 0,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "partial_rotary_factor": 1.0,
    }
    assert logits(tmp_path / "moe").isfinite().all()


def test_gates_survive_pruning_and_any_k(dense: Path, tmp_path: Path, texts: list[str]) -> None:
    carve_checkpoint(dense, tmp_path / "moe", texts=texts, options=OPTIONS)
    router = AutoModelForCausalLM.from_pretrained(tmp_path / "moe").model.layers[1].mlp.gate
    hidden = torch.randn(50, 32)
    gates = torch.full((50, 8), torch.nan)
    router.top_k = 8
    _, weights, experts = router(hidden)
    gates.scatter_(1, experts, weights)
    assert ((gates - 1).abs() < 0.1).all()

    kept = torch.tensor([0, 2, 3, 5, 7])
    router.weight.data = router.weight.data[kept]
    router.e_score_correction_bias = router.e_score_correction_bias[kept]
    router.num_experts, router.top_k = len(kept), 2
    _, weights, experts = router(hidden)
    assert torch.equal(weights, gates.gather(1, kept[experts]))


def test_same_arguments_give_the_same_bytes_and_the_seed_matters(
    dense: Path, tmp_path: Path, texts: list[str]
) -> None:
    first = carve_checkpoint(dense, tmp_path / "a", texts=texts, options=OPTIONS)
    second = carve_checkpoint(dense, tmp_path / "b", texts=texts, options=OPTIONS)
    other = CarveOptions(experts=8, top_k=3, max_tokens=2048, seed=1)
    carve_checkpoint(dense, tmp_path / "c", texts=texts, options=other)
    assert first == second
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    assert digest(tmp_path / "a") != digest(tmp_path / "c")


def test_router_finds_more_of_the_needed_experts_than_chance(
    dense: Path, tmp_path: Path, texts: list[str]
) -> None:
    report = carve_checkpoint(dense, tmp_path / "moe", texts=texts, options=OPTIONS)
    assert report.router_recall is not None
    assert report.router_recall > 1.3 * OPTIONS.top_k / OPTIONS.experts


def learned_for(model: Any) -> LearnedCarve:
    generator = np.random.default_rng(0)
    tensors: dict[str, Any] = {"norm": np.ones(32, np.float16) * 1.5}
    outputs = {"q_proj": 32, "k_proj": 16, "v_proj": 16, "o_proj": 32}
    shapes = {name: (size, 32) for name, size in outputs.items()}
    shapes |= {"gate_proj": (48, 32), "up_proj": (48, 32), "down_proj": (32, 48)}
    for index in range(2):
        for name, (rows, columns) in shapes.items():
            a = generator.standard_normal((2, columns)).astype(np.float32)
            b = 0.02 * generator.standard_normal((rows, 2)).astype(np.float32)
            for part, value in zip(("a", "b", "scale"), pack_delta(a, b), strict=True):
                tensors[f"{index}.{name}.{part}"] = value
        order = generator.permutation(48)
        routed = np.sort(order[16:].reshape(8, 4), axis=1)
        tensors[f"{index}.order"] = np.concatenate(
            [np.sort(order[:16]), routed.ravel()]
        ).astype(np.int16)
        router = generator.standard_normal((8, 32))
        tensors[f"{index}.router.weight"] = router.astype(np.float16)
        tensors[f"{index}.router.bias"] = np.zeros(8, np.float16)
        tensors[f"{index}.input_layernorm"] = np.full(32, 1.25, np.float16)
        tensors[f"{index}.post_attention_layernorm"] = np.full(32, 0.75, np.float16)
    return LearnedCarve(
        experts=8,
        shared_size=16,
        top_k=8,
        dense_sha256=weights_sha256(model),
        tensors=tensors,
    )


def test_learned_carve_is_the_dense_model_with_its_deltas(dense: Path, tmp_path: Path) -> None:
    reference = load_dense(dense).model
    learned = learned_for(reference)
    learned.save(tmp_path / "learned.safetensors")
    rebuild_checkpoint(dense, tmp_path / "moe", learned=tmp_path / "learned.safetensors")
    # The same changes made by hand on the dense model: with all experts both are one model.
    state = reference.state_dict()
    state["model.norm.weight"].fill_(1.5)
    for name, tensor in state.items():
        parts = name.split(".")
        if name.endswith("input_layernorm.weight"):
            tensor.fill_(1.25)
        elif name.endswith("post_attention_layernorm.weight"):
            tensor.fill_(0.75)
        elif parts[-2].endswith("_proj"):
            key = f"{parts[2]}.{parts[-2]}"
            a, b, scale = (learned.tensors[f"{key}.{part}"] for part in ("a", "b", "scale"))
            delta = torch.from_numpy((b.astype(np.float64) * scale) @ a).float()
            order = torch.from_numpy(learned.tensors[f"{parts[2]}.order"].astype(np.int64))
            if parts[-2] in {"gate_proj", "up_proj"}:
                tensor[order] += delta
            elif parts[-2] == "down_proj":
                tensor[:, order] += delta
            else:
                tensor += delta
    ids = torch.arange(4, 60)[None]
    with torch.no_grad():
        wanted = reference(ids).logits
    assert (logits(tmp_path / "moe") - wanted).abs().max() < 3e-3


def test_packed_delta_is_near_the_product() -> None:
    generator = np.random.default_rng(0)
    a = generator.standard_normal((4, 50)).astype(np.float32)
    b = generator.standard_normal((30, 4)).astype(np.float32)
    packed_a, packed_b, scale = pack_delta(a, b)
    error = (packed_b * scale) @ packed_a.astype(np.float32) - b @ a
    assert np.linalg.norm(error) < 0.02 * np.linalg.norm(b @ a)


def test_learned_carve_refuses_another_dense_model(dense: Path, tmp_path: Path) -> None:
    learned_for(random_dense(initializer_range=0.1)).save(tmp_path / "learned.safetensors")
    with pytest.raises(CarveError, match="learned on another checkpoint"):
        rebuild_checkpoint(dense, tmp_path / "moe", learned=tmp_path / "learned.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    with pytest.raises(CarveError, match="learned carve"):
        rebuild_checkpoint(dense, tmp_path / "moe", learned=tmp_path / "broken.safetensors")
    assert not (tmp_path / "moe").exists()


@settings(max_examples=60, deadline=None)
@given(
    neurons=st.integers(24, 4000),
    experts=st.integers(2, 24),
    fraction=st.floats(0.01, 0.99),
)
def test_shares_divide_exactly_and_are_the_nearest(
    neurons: int, experts: int, fraction: float
) -> None:
    possible = {
        (neurons - experts * size, size)
        for size in range(1, neurons)
        if neurons - experts * size > 0 and (neurons - experts * size) % size == 0
    }
    if not possible:
        with pytest.raises(CarveError, match="cannot be divided"):
            neuron_shares(neurons, experts=experts, shared_fraction=fraction)
        return
    found = neuron_shares(neurons, experts=experts, shared_fraction=fraction)
    assert found in possible
    distance = min(abs(shared - fraction * neurons) for shared, _ in possible)
    assert abs(found[0] - fraction * neurons) == pytest.approx(distance)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": 8, "top_k": 9}, "top-k must be between 1 and the 8 experts, got 9"),
        ({"experts": 8, "top_k": 0}, "top-k must be between 1"),
        ({"experts": 1}, "experts must be at least 2, got 1"),
        ({"experts": 8, "shared_fraction": 1.0}, "shared-fraction must be between 0 and 1"),
        ({"experts": 8, "seed": -1}, "seed must be in"),
        ({"experts": 8, "max_tokens": 10}, "max-tokens must be at least 512, got 10"),
    ],
)
def test_impossible_shapes_are_refused(
    dense: Path, tmp_path: Path, texts: list[str], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(CarveError, match=message):
        carve_checkpoint(
            dense,
            tmp_path / "moe",
            texts=texts,
            options=CarveOptions(**{"top_k": 2, **options}),
        )
    assert list(tmp_path.iterdir()) == []


def test_weights_that_do_not_fit_are_never_filled_with_random_ones(
    tmp_path: Path, texts: list[str]
) -> None:
    source = save_dense_checkpoint(tmp_path / "dense", random_dense(tie_word_embeddings=True))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    with pytest.raises(CheckpointError, match=r"1 tensors missing .*lm_head"):
        carve_checkpoint(source, tmp_path / "moe", texts=texts, options=OPTIONS)
    # A stray safetensors file must not make the pickle beside it acceptable.
    (source / "model.safetensors").rename(source / "adapter.safetensors")
    torch.save({}, source / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickle"):
        carve_checkpoint(source, tmp_path / "moe", texts=texts, options=OPTIONS)
    assert not (tmp_path / "moe").exists()


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"mlp_bias": True}, "no bias, got mlp_bias"),
        ({"attention_bias": True}, "no bias, got attention_bias"),
        ({"hidden_act": "gelu"}, "must be silu"),
    ],
)
def test_what_the_family_cannot_hold_is_refused_before_calibration(
    tmp_path: Path, changes: dict[str, Any], rule: str
) -> None:
    source = save_dense_checkpoint(tmp_path / "dense", random_dense(**changes))
    with pytest.raises(CarveError, match=rule):
        carve_checkpoint(source, tmp_path / "moe", texts=["too short"], options=OPTIONS)


def test_short_lines_are_calibrated_on_together(dense: Path, tmp_path: Path) -> None:
    lines = [" ".join(f"w{(7 * i + j) % WORDS}" for j in range(9)) for i in range(100)]
    carved = carve_checkpoint(dense, tmp_path / "moe", texts=lines, options=OPTIONS)
    assert carved.calibration_tokens == 900
    mode = (tmp_path / "moe" / "config.json").stat().st_mode
    assert (tmp_path / "moe" / "model.safetensors").stat().st_mode == mode


def test_unusable_sources_are_refused(dense: Path, tmp_path: Path, texts: list[str]) -> None:
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text((dense / "config.json").read_text())
    (pickled / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    with pytest.raises(CheckpointError, match=r"the pickle pytorch_model\.bin"):
        load_dense(pickled)
    with pytest.raises(CheckpointError, match="must exist"):
        load_dense(tmp_path / "nowhere")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF nonsense")
    with pytest.raises(CheckpointError, match="must be a whole GGUF file"):
        load_dense(tmp_path / "bad.gguf")
    gelu = save_dense_checkpoint(tmp_path / "gelu", random_dense(hidden_act="gelu"))
    with pytest.raises(CarveError, match="activation must be silu, got gelu"):
        carve_checkpoint(gelu, tmp_path / "moe", texts=texts, options=OPTIONS)
    config = json.loads((dense / "config.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    (other / "model.safetensors").write_bytes((dense / "model.safetensors").read_bytes())
    with pytest.raises(CarveError, match=r"can be carved \(llama, .*got gpt2"):
        load_dense(other)
    with pytest.raises(CarveError, match="calibration text must hold at least 512 tokens"):
        carve_checkpoint(dense, tmp_path / "moe", texts=["w1 w2"], options=OPTIONS)
    with pytest.raises(OutputError, match="must not exist"):
        carve_checkpoint(dense, gelu, texts=texts, options=OPTIONS)
    assert not (tmp_path / "moe").exists()
