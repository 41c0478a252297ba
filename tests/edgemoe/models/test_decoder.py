"""A model's cache goes by the name that its release of transformers wants."""

from __future__ import annotations

import warnings

import torch

from edgemoe.models.decoder import cache_name
from edgemoe.models.tiny import tiny_config, tiny_model


def test_the_cache_is_given_and_taken_by_a_name_that_warns_of_nothing() -> None:
    model = tiny_model(tiny_config("qwen3_moe"))
    name = cache_name(model)
    ids = torch.tensor([[5, 6, 7]])
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        whole = model(input_ids=ids, use_cache=True)
        first = model(input_ids=ids[:, :2], use_cache=True)
        second = model(input_ids=ids[:, 2:], use_cache=True, **{name: first[name]})
    assert torch.allclose(second.logits, whole.logits[:, 2:], atol=1e-5)
