from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from edgemoe.errors import CheckpointError
from edgemoe.k_policy import KPolicy
from edgemoe.k_rule import KRule
from edgemoe.models import adapt_model, limit_k, load_model, observe, save_model
from edgemoe.models.k_policy import (
    FILE_NAME,
    following,
    put_k_policy,
    read_k_policy,
)
from edgemoe.models.opening import open_streamed
from edgemoe.models.weights.fingerprint import fingerprint_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from edgemoe.models import MoeLayer, MoeModel, Routing

FAMILIES = ("glm4_moe", "mixtral", "qwen2_moe")


def policy_of(model: MoeModel, kind: str) -> KPolicy:
    random = torch.Generator().manual_seed(5)

    def rule(layer: MoeLayer) -> KRule:
        if kind == "fixed":
            return KRule(slots=2)
        if kind == "top-p":
            return KRule(slots=5, top_p=0.6)
        rows = torch.randn(5, layer.hidden_size + 1, generator=random).numpy()
        return KRule(slots=5, allocator=rows, top_p=0.9 if kind == "both" else None)

    layers = tuple(layer.index for layer in model.layers)
    return KPolicy(name=kind, layers=layers, rules=tuple(map(rule, model.layers)))


def routings(model: MoeModel, ids: torch.Tensor) -> dict[int, tuple[torch.Tensor, Routing]]:
    found = {}

    def keep(layer: MoeLayer, hidden: torch.Tensor, routing: Routing, _: object) -> None:
        found[layer.index] = (hidden.clone(), routing)

    with torch.no_grad(), observe(model, keep):
        model.model(ids)
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("k", [1, 3, 6])
def test_a_fixed_k_is_that_of_transformers(
    make_model: Callable[..., Any], token_ids: torch.Tensor, family: str, k: int
) -> None:
    model = adapt_model(make_model(family))
    other = make_model(family, num_experts_per_tok=k)
    rules = tuple(KRule(slots=k) for _ in model.layers)
    policy = KPolicy(name="fixed", layers=tuple(x.index for x in model.layers), rules=rules)
    with torch.no_grad():
        before = model.model(token_ids).logits
        with following(model, policy):
            found = model.model(token_ids).logits
        expected = other(token_ids).logits
        assert torch.equal(model.model(token_ids).logits, before)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_top_p_takes_the_fewest_experts_that_reach_the_share(
    make_model: Callable[..., Any], token_ids: torch.Tensor, family: str
) -> None:
    model = adapt_model(make_model(family))
    with following(model, policy_of(model, "top-p")):
        found = routings(model, token_ids)
    seen = set()
    for layer in model.layers:
        assert layer.rule is not None
        hidden, routing = found[layer.index]
        logits = hidden.double() @ layer.router_weight.double().T
        scores = logits.sigmoid() if layer.rule.scoring == "sigmoid" else logits.exp()
        mass = (scores / scores.sum(-1, keepdim=True)).numpy()
        bias = 0 if layer.correction_bias is None else layer.correction_bias.numpy()
        choice = (scores.numpy() if layer.rule.scoring == "sigmoid" else mass) + bias
        for token, row in enumerate(mass):
            order = np.argsort(-choice[token])
            sums = np.cumsum(row[order])
            wanted = min(5, int(np.searchsorted(sums, 0.6)) + 1)
            used = routing.indices[token]
            assert used[used < layer.num_experts].tolist() == order[:wanted].tolist()
            seen.add(wanted)
    assert len(seen) > 1


@pytest.mark.parametrize("kind", ["fixed", "top-p", "allocator", "both"])
def test_a_tokens_k_does_not_depend_on_what_it_comes_with(
    make_model: Callable[..., Any], token_ids: torch.Tensor, kind: str
) -> None:
    model = adapt_model(make_model("glm4_moe"))
    put_k_policy(model, policy_of(model, kind))
    both = routings(model, token_ids)
    for row in range(2):
        for length in (1, 6, 11):
            alone = routings(model, token_ids[row : row + 1, :length])
            for index, (_, routing) in alone.items():
                first = row * token_ids.shape[1]
                expected = both[index][1].indices[first : first + length]
                assert torch.equal(routing.indices, expected)
    counts = {int((r.indices < 8).sum(-1)[n]) for _, r in both.values() for n in range(22)}
    assert len(counts) == 1 if kind == "fixed" else len(counts) > 1


@pytest.mark.parametrize("kind", ["top-p", "allocator", "both"])
def test_a_cap_and_a_policy_leave_the_smaller_number(
    make_model: Callable[..., Any], token_ids: torch.Tensor, kind: str
) -> None:
    model = adapt_model(make_model("mixtral"))
    put_k_policy(model, policy_of(model, kind))
    first = model.layers[0]
    free = routings(model, token_ids)[first.index][1]
    for cap in (1, 2, 4):
        with limit_k(model, cap):
            capped = routings(model, token_ids)[first.index][1]
        wanted = (free.indices < 8).sum(-1).clamp(max=cap)
        assert torch.equal((capped.indices < 8).sum(-1), wanted)
        # Gates of the experts that are left add up to 1 again.
        torch.testing.assert_close(capped.weights.sum(-1), torch.ones(22))


@pytest.mark.parametrize("kind", ["fixed", "top-p", "allocator", "both"])
def test_checkpoints_keep_a_policy_that_transformers_ignores(
    make_checkpoint: Callable[..., Path],
    token_ids: torch.Tensor,
    tmp_path: Path,
    kind: str,
) -> None:
    source = make_checkpoint("qwen2_moe")
    model = load_model(source)
    with torch.no_grad():
        plain = model.model(token_ids).logits
        put_k_policy(model, policy_of(model, kind))
        expected = model.model(token_ids).logits
    path = tmp_path / "kept"
    path.mkdir()
    save_model(model, path)
    again = load_model(path)
    assert again.k_policy == model.k_policy
    stock = AutoModelForCausalLM.from_pretrained(path, experts_implementation="eager")
    with torch.no_grad():
        assert torch.equal(again.model(token_ids).logits, expected)
        torch.testing.assert_close(stock(token_ids).logits, plain)
        streamed = open_streamed(path).moe
    assert not torch.allclose(expected, plain)
    assert streamed.k_policy == model.k_policy
    fingerprint = fingerprint_checkpoint(path)
    (path / FILE_NAME).unlink()
    assert fingerprint_checkpoint(path) != fingerprint


def test_a_policy_that_does_not_fit_is_refused(make_model: Callable[..., Any]) -> None:
    model = adapt_model(make_model("glm4_moe", n_group=4, topk_group=2))
    layers = tuple(layer.index for layer in model.layers)
    wide = np.zeros((2, model.layers[0].hidden_size), np.float32)
    for rule, message in (
        (KRule(slots=5), "between 1 and 4 experts"),
        (KRule(slots=0), "between 1 and 4 experts"),
        (KRule(slots=3, top_p=0.0), r"top_p must be in \(0, 1\]"),
        (KRule(slots=2, allocator=wide), r"must have the shape \(2, 33\)"),
    ):
        policy = KPolicy(name="any", layers=layers, rules=(rule,) * len(layers))
        with pytest.raises(CheckpointError, match=message):
            put_k_policy(model, policy)
        assert model.k_policy is None
        assert all(layer.k_rule is None for layer in model.layers)
    other = KPolicy(name="fixed", layers=(0,), rules=(KRule(slots=1),))
    with pytest.raises(CheckpointError, match="name each MoE layer once"):
        put_k_policy(model, other)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"layer": 0}, "k one in"),
        ({"layer": 0, "k": True}, "k one in"),
        ({"layer": -1, "k": 1}, "layer must be"),
        ({"layer": 0, "k": 1, "p": 1}, "a layer must have"),
        ({"layer": 0, "k": 1, "top_p": "x"}, "top_p must be a number"),
        ({"layer": 0, "k": 2, "allocator": "AAAA"}, "2 rows of float32"),
        ({"layer": 0, "k": 1, "allocator": "AADAfw=="}, "finite"),
        ({"layer": 0, "k": 1, "allocator": 7}, "1 rows of float32"),
    ],
)
def test_a_broken_file_is_refused(tmp_path: Path, entry: Any, message: str) -> None:
    head = {"format": "edgemoe.k_policy", "version": 1, "policy": "fixed", "provenance": {}}
    (tmp_path / FILE_NAME).write_text(json.dumps({**head, "layers": [entry]}))
    with pytest.raises(CheckpointError, match=message):
        read_k_policy(tmp_path)


def test_files_of_other_versions_and_orders_are_refused(tmp_path: Path) -> None:
    head = {"format": "edgemoe.k_policy", "version": 1, "policy": "fixed", "provenance": {}}
    twice = [{"layer": 3, "k": 1}, {"layer": 3, "k": 1}]
    for content, message in (
        ({**head, "version": 2, "layers": []}, "version 1, got"),
        ({**head, "layers": twice}, "ascending order"),
        ({**head, "layers": []}, "nothing else"),
        ({**head, "extra": 1, "layers": twice}, "nothing else"),
    ):
        (tmp_path / FILE_NAME).write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match=message):
            read_k_policy(tmp_path)
    (tmp_path / FILE_NAME).unlink()
    assert read_k_policy(tmp_path) is None
