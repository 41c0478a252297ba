"""One layer at a time gives the bits of the whole model, or is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from edgemoe.errors import StreamingError
from edgemoe.layerwise.outputs import LayerOutputs
from edgemoe.layerwise.replay import from_layer, only_layer
from edgemoe.layerwise.returned import Sharing, hidden_of, map_tensors
from edgemoe.models.safety import check_weights
from edgemoe.models.streaming import Skeleton
from edgemoe.models.tiny import tiny_config, tiny_model

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
LATENT = {
    "n_routed_experts": 8,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "n_group": 1,
    "topk_group": 1,
}
MIXED = ["sliding_attention", "full_attention"] * 2
# Transposed and biased experts, latent attention, state spaces, linear attention, convolution,
# and keys of two layers that later ones use too.
FAMILIES: dict[str, dict[str, Any]] = {
    "olmoe": {"num_experts": 8},
    "granitemoe": {"num_local_experts": 8},
    "gpt_oss": {"num_local_experts": 8, "layer_types": MIXED, "sliding_window": 4},
    "deepseek_v3": LATENT,
    "qwen3_next": {
        "num_experts": 8,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "jamba": {
        "num_experts": 4,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "use_mamba_kernels": False,
    },
    "lfm2_moe": {
        "num_experts": 8,
        "moe_intermediate_size": 16,
        "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention"] * 2,
    },
    "gemma4_text": {
        "enable_moe_block": True,
        "num_experts": 8,
        "top_k_experts": 2,
        "moe_intermediate_size": 16,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 96,
        "layer_types": MIXED,
        "global_head_dim": 8,
    },
}


def make(path: Path, family: str, options: dict[str, Any]) -> tuple[Any, Skeleton]:
    """A tiny random checkpoint, loaded whole and opened layer by layer."""
    config = AutoConfig.for_model(family, **{**COMMON, **options})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(path, max_shard_size="30KB")
    whole = type(model).from_pretrained(path, dtype=torch.float32).eval().requires_grad_(False)
    for tensor in (*whole.parameters(), *whole.buffers()):
        tensor.data = tensor.data.clone()
    config = AutoConfig.from_pretrained(path)
    return whole, Skeleton(type(model), config, check_weights(path), torch.float32)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_with_any_layer_replay_to_the_bit(tmp_path: Path, family: str) -> None:
    whole, skeleton = make(tmp_path / "model", family, FAMILIES[family])
    batches = [torch.randint(0, 96, (1, length)) for length in (7, 12, 5)]
    expected: list[list[torch.Tensor]] = []
    for layer in whole.get_decoder().layers:
        layer.register_forward_hook(lambda _, __, output: expected[-1].append(output))
    with torch.inference_mode():
        for batch in batches:
            expected.append([])
            whole.get_decoder()(input_ids=batch, use_cache=False)
    skeleton.load_outer()

    before: Any = [None] * len(batches)
    for index in range(len(skeleton.layers)):
        folder = tmp_path / str(index)
        folder.mkdir()
        outputs = LayerOutputs(folder, limit_bytes=3000)
        with (
            skeleton.layer(index),
            only_layer(skeleton.decoder, skeleton.layers, index) as run,
        ):
            for batch, given in zip(batches, before, strict=True):
                outputs.append(run({"input_ids": batch, "use_cache": False}, given))
        outputs.finish()
        for found, wanted in zip(outputs, expected, strict=True):
            assert torch.equal(hidden_of(found), wanted[index]), index
        before = outputs if index % 2 else LayerOutputs.reopen(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_but_the_first_layers_give_the_bits_of_all(tmp_path: Path, family: str) -> None:
    whole, _ = make(tmp_path / "model", family, FAMILIES[family])
    inputs = {"input_ids": torch.randint(0, 96, (1, 9)), "use_cache": False}
    with torch.no_grad():
        expected = whole(**inputs).logits
    decoder = whole.get_decoder()
    given: Any = None
    for first in range(len(decoder.layers) + 1):
        with from_layer(whole, decoder.layers, first) as finish:
            assert torch.equal(finish(inputs, given).logits, expected), first
        if first < len(decoder.layers):
            with only_layer(decoder, decoder.layers, first) as run:
                given = run(inputs, given)
    # What the layers before returned is all that counts.
    with only_layer(decoder, decoder.layers, 0) as run:
        returned = run(inputs, None)
    with from_layer(whole, decoder.layers, 1) as finish:
        other = map_tensors(returned, torch.ones_like)
        assert not torch.allclose(finish(inputs, other).logits, expected)


class Decoder(nn.Module):
    """Four layers; the last also reads what the one before the last but one returned."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        seen = [hidden]
        for index, layer in enumerate(self.layers):
            skipped = seen[2] if index == 3 else 0
            seen.append(layer(seen[-1] + skipped))
        return seen[-1]


def test_outputs_that_skip_a_layer_are_noticed() -> None:
    decoder = Decoder()
    hidden = torch.randn(2, 4)
    given: Any = None
    for index in range(3):
        with only_layer(decoder, decoder.layers, index) as run:
            given = run({"hidden": hidden}, given)

    with (
        only_layer(decoder, decoder.layers, 3) as run,
        pytest.raises(StreamingError, match="layer 3, which also reads"),
    ):
        run({"hidden": hidden}, given)
    # Nothing of it stays behind.
    assert torch.isfinite(decoder(hidden)).all()


def test_layers_that_run_several_times_are_refused_from_the_first_on() -> None:
    """The loop is all that follows the first layer: nothing else would tell that it repeats."""
    config = tiny_config(
        "inkling2_loop_text",
        num_hidden_layers=2,
        layer_types=["hybrid_sliding", "hybrid"],
        loop_layer_index_start=1,
        loop_layer_index_end=2,
    )
    model = tiny_model(config)
    layers = model.get_decoder().layers

    for index in range(2):
        with (
            pytest.raises(StreamingError, match=r"2 decoder layers once .* makes 3 visits"),
            only_layer(model.get_decoder(), layers, index),
        ):
            pass
    with pytest.raises(StreamingError, match="makes 3 visits"), from_layer(model, layers, 2):
        pass


class Sharer(nn.Module):
    """A layer that tells all later ones of itself, through whatever it is given."""

    def __init__(self, tell: Callable[[Any, torch.Tensor], None]) -> None:
        super().__init__()
        self.tell = tell

    def forward(self, hidden: torch.Tensor, told: Any) -> torch.Tensor:
        self.tell(told, hidden)
        return hidden + 1


class SharingDecoder(nn.Module):
    """Three such layers."""

    def __init__(self, tell: Callable[[Any, torch.Tensor], None], start: type) -> None:
        super().__init__()
        self.start = start
        self.layers = nn.ModuleList(Sharer(tell) for _ in range(3))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        told = self.start()
        for layer in self.layers:
            hidden = layer(hidden, told=told)
        return hidden


def test_what_layers_put_into_a_dictionary_of_all_is_carried_on() -> None:
    decoder = SharingDecoder(lambda told, hidden: told.update({f"{len(told)}": hidden}), dict)
    given: Any = None
    for index in range(3):
        with only_layer(decoder, decoder.layers, index) as run:
            given = run({"hidden": torch.zeros(1)}, given)

    assert isinstance(given, Sharing)
    assert given.shared == {"told": {"0": 0, "1": 1, "2": 2}}
    assert hidden_of(given) == 3


def in_place(told: Any, hidden: torch.Tensor) -> None:
    told.setdefault("sum", hidden.clone()).add_(hidden)


@pytest.mark.parametrize(
    ("tell", "start", "message"),
    [
        (
            lambda told, hidden: told.append(hidden),
            list,
            r"layer 0 .* changes its argument told",
        ),
        (lambda told, _: told.update({0: None}), dict, r"layer 0 .* changes its argument told"),
        (lambda told, hidden: told.update(a=[hidden]), dict, r"got a list from layer 0"),
        (in_place, dict, r"layer 1 \(Sharer\), which changes one in place"),
    ],
)
def test_what_layers_tell_otherwise_is_refused(
    tell: Callable[[Any, torch.Tensor], None], start: type, message: str
) -> None:
    decoder = SharingDecoder(tell, start)

    def run_two() -> None:
        given: Any = None
        for index in range(2):
            with only_layer(decoder, decoder.layers, index) as run:
                given = run({"hidden": torch.ones(1)}, given)

    with pytest.raises(StreamingError, match=message):
        run_two()
