from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import scipy
import torch

from edgemoe.decompose.layer_factors import expert_matrices
from edgemoe.decompose.svd import svd
from edgemoe.models.layers.factored import factor_layer, factored, product_shapes
from edgemoe.models.tiny import VOCAB_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgemoe.models.contract import MoeModel

# Plain; transposed, interleaved and biased; without a gate; with wide experts.
FAMILIES = ("mixtral", "gpt_oss", "nemotron_h", "qwen3_moe")


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(0, VOCAB_SIZE, (2, 17), generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("family", FAMILIES)
def test_each_expert_is_the_nearest_of_its_ranks(
    make_moe: Callable[..., MoeModel], family: str
) -> None:
    layer = make_moe(family).layers[0]
    shapes = product_shapes(layer)
    ranks = [(3 + expert % 3, 2 + expert % 4) for expert in range(layer.num_experts)]

    found = svd(layer, ranks)

    lost = [0.0, 0.0]
    for expert, pair in enumerate(ranks):
        matrices = expert_matrices(layer, expert)
        for part, name in enumerate(("up", "down")):
            assert tuple(matrices[part].shape) == shapes[part]
            inner, outer = (found.tensors[f"{name}_{side}"][expert] for side in ("in", "out"))
            rank = pair[part]
            # Smaller ranks are padded with zeros.
            assert not inner[rank:].any()
            assert not outer[:, rank:].any()
            left, values, right = scipy.linalg.svd(matrices[part].double().numpy())
            expected = (left[:, :rank] * values[:rank]) @ right[:rank]
            np.testing.assert_allclose((outer @ inner).numpy(), expected, atol=2e-5)
            lost[part] += float((values[rank:] ** 2).sum())
    assert found.lost == pytest.approx(tuple(lost), rel=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_full_rank_says_the_same(
    make_moe: Callable[..., MoeModel], ids: torch.Tensor, family: str
) -> None:
    model = make_moe(family)
    before = model.model(ids).logits

    for layer in model.layers:
        up, down = (min(shape) for shape in product_shapes(layer))
        factor_layer(layer, svd(layer, [(up, down)] * layer.num_experts).tensors)

    torch.testing.assert_close(model.model(ids).logits, before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_is_factored_for_a_while(
    make_moe: Callable[..., MoeModel], ids: torch.Tensor, family: str
) -> None:
    model = make_moe(family)
    before = model.model(ids).logits
    names = list(model.model.state_dict())
    layer = model.layers[0]
    family_class = type(layer.experts)
    factors = svd(layer, [(4, 4)] * layer.num_experts).tensors

    with factored(layer, factors):
        assert layer.is_factored
        during = model.model(ids).logits
        hidden = torch.randn(5, layer.hidden_size)
        assert layer.expert_output(1, hidden).shape == hidden.shape

    assert not torch.allclose(during, before)
    assert not layer.is_factored
    assert type(layer.experts) is family_class
    assert list(model.model.state_dict()) == names
    assert torch.equal(model.model(ids).logits, before)
