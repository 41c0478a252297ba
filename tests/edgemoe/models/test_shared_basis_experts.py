"""Experts between shared bases say what the same experts say written out in full."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

from edgemoe.apply.in_memory import apply_plan
from edgemoe.apply.streamed import apply_streamed
from edgemoe.cli.describe.file import describe
from edgemoe.decompose.shared_basis import share_basis
from edgemoe.errors import CheckpointError, PlanError
from edgemoe.models import limit_k, load_model, read_shape, save_model
from edgemoe.models.adapter import adapt_model
from edgemoe.models.layers.factored import factor_layer, split_by_svd
from edgemoe.models.layers.shared_basis import based, empty_bases, to_shared_basis
from edgemoe.models.opening import open_streamed
from edgemoe.models.tiny import VOCAB_SIZE, tiny_config, tiny_model, write_tiny_checkpoint
from edgemoe.models.weights.fingerprint import fingerprint_checkpoint
from edgemoe.prune import LayerPlan, MergedExpert, Plan

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from edgemoe.models import MoeLayer, MoeModel

RANK = 24
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
SOME = ("qwen3_moe", "gpt_oss", "nemotron_h")
# Each stores or runs experts in a way of its own.
FAMILIES = (
    "aria_text", "deepseek_v3", "deepseek_v4", "gemma4_text", "glm4_moe", "gpt_oss",
    "granitemoe", "lfm2_moe", "mixtral", "nemotron_h", "qwen3_5_moe_text",
)  # fmt: skip


def base(layer: MoeLayer, rank: int = RANK) -> None:
    to_shared_basis(layer, share_basis(layer, rank).tensors)


@torch.no_grad()
def write_out(layer: MoeLayer) -> dict[str, torch.Tensor]:
    """Multiply a layer's experts with its bases, as the family stores experts."""
    experts: Any = layer.experts
    reads, writes = experts.input_basis, experts.output_basis
    first = layer.layout.gate_up_name
    products = ("erw,rh->ehw", "eir,hr->eih")
    if not layer.layout.is_transposed:
        products = ("ewr,rh->ewh", "eri,hr->ehi")
    whole = {
        first: torch.einsum(products[0], getattr(experts, first), reads),
        "down_proj": torch.einsum(products[1], experts.down_proj, writes),
    }
    if layer.layout.has_bias:
        whole["down_proj_bias"] = torch.einsum("er,hr->eh", experts.down_proj_bias, writes)
    return {f"{layer.name}.{layer.spec.experts}.{name}": t for name, t in whole.items()}


def written_out(based: MoeModel, whole: MoeModel) -> MoeModel:
    """Give ``whole`` the weights of ``based``, written out."""
    state = {
        name: tensor
        for name, tensor in based.model.state_dict().items()
        if "_basis" not in name
    }
    for layer in based.layers:
        if layer.is_based:
            state.update(write_out(layer))
    whole.model.load_state_dict(state)
    return whole


@torch.no_grad()
def logits_of(model: MoeModel) -> torch.Tensor:
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(3, VOCAB_SIZE, (2, 11), generator=draw)
    logits: torch.Tensor = model.model(input_ids=ids, use_cache=False).logits
    return logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_based_checkpoint_of_any_family_is_what_it_stands_for(
    family: str, tmp_path: Path
) -> None:
    path = write_tiny_checkpoint(family, tmp_path / "whole")
    model = load_model(path)
    before = logits_of(model)
    for position, layer in enumerate(model.layers[:-1]):
        base(layer, RANK + 8 * position)
    (tmp_path / "based").mkdir()
    save_model(model, tmp_path / "based", source=path)

    after = logits_of(model)
    assert not torch.allclose(after, before, rtol=1e-3, atol=1e-3)
    explicit = logits_of(written_out(model, load_model(path)))
    torch.testing.assert_close(after, explicit, rtol=1e-3, atol=2e-4)
    again = load_model(tmp_path / "based")
    streamed = open_streamed(tmp_path / "based")
    weights, loaded = model.model.state_dict(), again.model.state_dict()
    assert loaded.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(loaded[name], tensor), name
        if "experts" in name:
            assert torch.equal(streamed.skeleton.read(name), tensor), name
    torch.testing.assert_close(logits_of(again), after, rtol=1e-4, atol=1e-4)
    ranks = [layer.basis_rank for layer in model.layers]
    assert ranks == [RANK + 8 * n for n in range(len(ranks) - 1)] + [None]
    assert [layer.basis_rank for layer in again.layers] == ranks
    assert [layer.basis_rank for layer in streamed.moe.layers] == ranks
    assert read_shape(tmp_path / "based") == model.shape == load_model(path).shape
    stored = json.loads((tmp_path / "based" / "config.json").read_text())["edgemoe"]
    assert stored["basis_per_layer"] == describe(tmp_path / "based")["basis_per_layer"] == ranks


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", SOME)
def test_every_implementation_of_experts_runs_between_bases(
    family: str, implementation: str
) -> None:
    model = adapt_model(tiny_model(tiny_config(family)))
    for layer in model.layers:
        base(layer)
    explicit = written_out(model, adapt_model(tiny_model(tiny_config(family))))
    model.model.set_experts_implementation(implementation)
    # The loop of gpt_oss knows no unused slots.
    for cap in (99, 1) if implementation == "grouped_mm" else (99,):
        with limit_k(model, cap), limit_k(explicit, cap):
            found, expected = logits_of(model), logits_of(explicit)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("family", SOME)
def test_one_expert_is_that_expert_written_out(family: str) -> None:
    layer = adapt_model(tiny_model(tiny_config(family))).layers[0]
    whole = adapt_model(tiny_model(tiny_config(family))).layers[0]
    hidden, units = layer.hidden_size, layer.intermediate_size
    base(layer)
    prefix = f"{layer.name}."
    written = {name.removeprefix(prefix): t for name, t in write_out(layer).items()}
    whole.replace({**whole.tensors(), **written})
    states = torch.randn(5, hidden, generator=torch.Generator().manual_seed(0))

    assert (layer.hidden_size, layer.intermediate_size) == (hidden, units)
    assert layer.gate_up.shape[2] == layer.down.shape[1] == layer.basis_rank == RANK
    for expert in (0, 5):
        torch.testing.assert_close(
            layer.expert_output(expert, states),
            whole.expert_output(expert, states),
            rtol=1e-4,
            atol=1e-5,
        )


def merging_plan(model: MoeModel, sha256: str) -> Plan:
    layers = []
    for position, layer in enumerate(model.layers):
        experts = [MergedExpert(members=(expert,)) for expert in range(1 + position, 7)]
        experts.append(MergedExpert(members=(7, 0), weights=(1.0, 3.0)))
        layers.append(LayerPlan(layer=layer.index, experts=tuple(experts)))
    return Plan(method="by-hand", layers=tuple(layers), checkpoint_sha256=sha256)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "glm4_moe"])
def test_dropping_and_merging_commute_with_writing_out(family: str, tmp_path: Path) -> None:
    """Bases are orthonormal, so neurons are as alike between them as outside."""
    whole = write_tiny_checkpoint(family, tmp_path / "whole", num_hidden_layers=3)
    model = load_model(whole)
    for layer in model.layers[:-1]:
        base(layer)
    (tmp_path / "based").mkdir()
    save_model(model, tmp_path / "based", source=whole)
    explicit = written_out(model, load_model(whole))
    plan = merging_plan(model, fingerprint_checkpoint(tmp_path / "based"))

    small = apply_plan(load_model(tmp_path / "based"), plan)
    (tmp_path / "small").mkdir()
    save_model(small, tmp_path / "small", source=whole)
    apply_streamed(tmp_path / "based", plan, tmp_path / "streamed", max_shard_bytes=40_000)

    expected = apply_plan(explicit, merging_plan(explicit, explicit.sha256))
    torch.testing.assert_close(logits_of(small), logits_of(expected), rtol=1e-3, atol=2e-4)
    streamed, loaded = load_model(tmp_path / "streamed"), load_model(tmp_path / "small")
    assert streamed.experts_per_layer == loaded.experts_per_layer == plan.experts_per_layer
    weights = loaded.model.state_dict()
    for name, tensor in streamed.model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    assert streamed.sha256 != model.sha256
    for name in ("edgemoe.json", "config.json"):
        other = tmp_path / "streamed" / name
        assert (tmp_path / "small" / name).read_bytes() == other.read_bytes()


def test_the_rank_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    model = load_model(write_tiny_checkpoint("mixtral", tmp_path / "whole"))
    base(model.layers[0])
    (tmp_path / "based").mkdir()
    save_model(model, tmp_path / "based")
    before = fingerprint_checkpoint(tmp_path / "based")
    edit(tmp_path / "based", lambda note: note.update(basis_per_layer=[23, *[None] * 3]))
    assert fingerprint_checkpoint(tmp_path / "based") != before


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    note = json.loads((path / "edgemoe.json").read_text())
    change(note)
    (path / "edgemoe.json").write_text(json.dumps(note))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"basis_per_layer": [24]}, "for each of the 4 MoE layers, got"),
        ({"basis_per_layer": [24, None, None, 0]}, "an integer in"),
        ({"basis_per_layer": [24, None, None, True]}, "an integer in"),
        ({"basis_per_layer": {"0": 24}}, "an integer in"),
        ({"basis_per_layer": [65, None, None, None]}, r"in \[1, 64\], the hidden size, got 65"),
        ({"basis_per_layer": [23, None, None, None]}, "must fit its config.json"),
        ({"basis_per_layer": [None] * 4}, "must fit its config.json"),
        ({"basis_per_layer": None}, "must fit its config.json"),
        ({"ranks_per_layer": [[4, 4], None, None, None]}, "factored or share bases, got both"),
        ({"bases": []}, "no other keys"),
    ],
)
def test_a_note_that_does_not_fit_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = load_model(write_tiny_checkpoint("mixtral", tmp_path / "whole"))
    base(model.layers[0])
    (tmp_path / "based").mkdir()
    save_model(model, tmp_path / "based")
    edit(tmp_path / "based", lambda note: note.update(change))
    for opens in (load_model, open_streamed):
        with pytest.raises(CheckpointError, match=message):
            opens(tmp_path / "based")


def test_a_layer_is_factored_or_based_once() -> None:
    layers = adapt_model(tiny_model(tiny_config("mixtral"))).layers
    base(layers[0])
    factor_layer(layers[1], split_by_svd(layers[1], 4))
    for layer in layers[:2]:
        tensors = empty_bases(layers[2], 8)
        with pytest.raises(CheckpointError, match="full hidden size to get shared bases"):
            to_shared_basis(layer, tensors)
        with pytest.raises(CheckpointError, match="whole experts to be factored"):
            factor_layer(layer, split_by_svd(layers[2], 4))
        with pytest.raises(PlanError, match="whole experts of the full hidden size"):
            share_basis(layer, 8)


def test_tensors_that_do_not_fit_change_nothing() -> None:
    model = adapt_model(tiny_model(tiny_config("gpt_oss")))
    layer = model.layers[0]
    before = logits_of(model)
    good = empty_bases(layer, 8)
    for name, tensor in good.items():
        with pytest.raises(CheckpointError, match=f"rank of shared bases|{name} must have"):
            to_shared_basis(layer, {**good, name: tensor[..., :-1]})
        with pytest.raises(CheckpointError, match=r"rank of shared bases|got None"):
            to_shared_basis(layer, {key: value for key, value in good.items() if key != name})
    assert not layer.is_based
    assert torch.equal(logits_of(model), before)


@pytest.mark.parametrize("family", SOME)
def test_bases_for_a_while_leave_the_layer_as_it_was(family: str) -> None:
    model = adapt_model(tiny_model(tiny_config(family)))
    layer = model.layers[0]
    before, tensors = logits_of(model), share_basis(layer, RANK).tensors
    names = list(model.model.state_dict())

    with based(layer, tensors):
        inside = logits_of(model)
        assert layer.basis_rank == RANK
    assert layer.basis_rank is None
    assert torch.equal(logits_of(model), before)
    assert list(model.model.state_dict()) == names
    to_shared_basis(layer, tensors)
    assert torch.equal(logits_of(model), inside)
    assert not torch.allclose(inside, before, atol=1e-2)
