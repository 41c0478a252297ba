"""Log-probabilities against one forward pass per prefix, and independence of batching."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from edgemoe.allocate.usage import count_experts
from edgemoe.calibrate.sample import Window
from edgemoe.errors import CheckpointError, EdgemoeError
from edgemoe.evaluate.scorer import Request, token_logprobs
from edgemoe.evaluate.session_scorer import SessionScorer
from edgemoe.evaluate.torch_scorer import TorchScorer
from edgemoe.k_policy import KPolicy
from edgemoe.k_rule import KRule
from edgemoe.models import adapt_model, limit_k
from edgemoe.models.k_policy import put_k_policy

FAMILIES = ("glm4_moe", "mixtral", "qwen2_moe")

# Parity of float32 computed in two orders; a wrong token or position is off by 0.1 and more.
TOLERANCE = 2e-5


@pytest.fixture(scope="session")
def dense_model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        max_position_embeddings=64,
    )
    return transformers.LlamaForCausalLM(config).eval()


def score_naively(model: Any, ids: tuple[int, ...], start: int) -> list[float]:
    found = []
    with torch.inference_mode():
        for position in range(start, len(ids)):
            logits = model(input_ids=torch.tensor([ids[:position]]), use_cache=False).logits
            found.append(float(logits[0, -1].double().log_softmax(-1)[ids[position]]))
    return found


def draw_request(random: np.random.Generator, continuations: int = 1) -> Request:
    def ids() -> tuple[int, ...]:
        return tuple(random.integers(96, size=random.integers(1, 9)).tolist())

    return Request(ids(), tuple(ids() for _ in range(continuations)))


@pytest.mark.parametrize("family", [*FAMILIES, "dense"])
def test_every_way_of_scoring_equals_one_pass_per_prefix(
    make_model: Callable[..., Any], dense_model: Any, family: str
) -> None:
    model = dense_model if family == "dense" else make_model(family)
    scorer = TorchScorer(model if family == "dense" else adapt_model(model), batch_tokens=20)
    random = np.random.Generator(np.random.PCG64(5))
    requests = [draw_request(random, count) for count in (1, 3, 1, 1, 2, 1)]
    requests.append(Request((5, 6, 7), ((1,), (2,), (3,))))
    for request, scored in zip(requests, scorer.score(requests), strict=True):
        for continuation, logprobs in zip(request.continuations, scored, strict=True):
            expected = score_naively(
                model, request.context + continuation, len(request.context)
            )
            assert logprobs.dtype == np.float64
            np.testing.assert_allclose(logprobs, expected, rtol=0, atol=TOLERANCE)
    single = token_logprobs(scorer, [3, 1, 4, 1, 5], 2)
    np.testing.assert_allclose(
        single, score_naively(model, (3, 1, 4, 1, 5), 2), rtol=0, atol=TOLERANCE
    )
    for start in (0, 5):
        with pytest.raises(ValueError, match="start must be"):
            token_logprobs(scorer, [3, 1, 4, 1, 5], start)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32), batch_tokens=st.integers(1, 200))
def test_results_do_not_depend_on_what_is_scored_beside(
    dense_model: Any, seed: int, batch_tokens: int
) -> None:
    random = np.random.Generator(np.random.PCG64(seed))
    requests = [draw_request(random, int(count)) for count in random.choice([1, 1, 3], size=9)]
    together = TorchScorer(dense_model, batch_tokens=batch_tokens).score(requests)
    for request, scored in zip(requests, together, strict=True):
        (alone,) = TorchScorer(dense_model).score([request])
        for ours, theirs in zip(scored, alone, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)
            # Choices never share a batch with another line.
            assert len(request.continuations) == 1 or (ours == theirs).all()


def test_many_choices_are_run_in_parts(dense_model: Any, monkeypatch: Any) -> None:
    request = Request((1, 2, 3), (*((9, *range(1, 2 + i % 4)) for i in range(7)), (8,)))
    (whole,) = TorchScorer(dense_model).score([request])
    monkeypatch.setattr("edgemoe.evaluate.torch_scorer._CACHE_TOKENS", 8)
    (parts,) = TorchScorer(dense_model).score([request])
    for ours, theirs in zip(parts, whole, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)


def test_a_cap_limits_the_experts_and_full_k_changes_no_bit(
    make_model: Callable[..., Any], dense_model: Any
) -> None:
    model = adapt_model(make_model("glm4_moe"))
    random = np.random.Generator(np.random.PCG64(5))
    requests = [draw_request(random, count) for count in (1, 2, 1)]
    full = TorchScorer(model).score(requests)
    for cap in (3, 100):
        capped = TorchScorer(model, k_cap=cap).score(requests)
        assert all(
            (a == b).all()
            for x, y in zip(full, capped, strict=True)
            for a, b in zip(x, y, strict=True)
        )
    caps: tuple[int | list[int], ...] = (1, [2, 1])
    for limit in caps:
        scored = TorchScorer(model, k_cap=limit).score(requests)
        with limit_k(model, limit):
            expected = score_naively(
                model.model,
                requests[0].context + requests[0].continuations[0],
                len(requests[0].context),
            )
        np.testing.assert_allclose(scored[0][0], expected, rtol=0, atol=TOLERANCE)
        assert np.abs(scored[0][0] - full[0][0]).max() > 1e-3
    with pytest.raises(EdgemoeError, match="k_cap"):
        TorchScorer(model, k_cap=0)
    with pytest.raises(EdgemoeError, match="2 MoE layers"):
        TorchScorer(model, k_cap=[1])
    with pytest.raises(CheckpointError, match="dense"):
        TorchScorer(dense_model, k_cap=1)


def test_a_session_is_asked_for_each_continuation() -> None:
    class Session:
        def token_logprobs(self, ids: Any, start: int) -> Any:
            self.experts_per_token = float(len(ids))
            return np.array([float(token) for token in ids[start:]])

        def explain(self) -> Any:
            return self

    scorer = SessionScorer(Session(), max_length=7)
    assert scorer.experts_per_token is None
    requests = [Request((1, 2), ((3, 4), (5,))), Request((6,), ((7,),))]
    scored = [[list(part) for part in parts] for parts in scorer.score(requests)]
    assert scored == [[[3, 4], [5]], [[7]]]
    assert scorer.max_length == 7
    # The last token never runs: 3 tokens, 2 and 1, in sequences of 4, 3 and 2.
    assert scorer.experts_per_token == (3 * 4 + 2 * 3 + 1 * 2) / 6


def test_tokens_tell_how_many_experts_they_used_and_padding_does_not(
    make_model: Callable[..., Any], dense_model: Any
) -> None:
    model = adapt_model(make_model("glm4_moe"))
    random = np.random.Generator(np.random.PCG64(7))
    requests = [draw_request(random, 1) for _ in range(6)]
    assert TorchScorer(dense_model).experts_per_token is None
    assert TorchScorer(model).experts_per_token == 3
    assert TorchScorer(model, k_cap=[2, 9]).experts_per_token == 2.5
    rules = tuple(KRule(slots=5, top_p=0.4) for _ in model.layers)
    layers = tuple(layer.index for layer in model.layers)
    put_k_policy(model, KPolicy(name="top-p", layers=layers, rules=rules))
    scorer = TorchScorer(model)
    assert scorer.experts_per_token is None
    scorer.score(requests)
    # A line's last token is scored, and not read.
    rows = [[*request.context, *request.continuations[0]][:-1] for request in requests]
    assert len({len(row) for row in rows}) > 1
    windows = [Window(line=n, start=0, ids=row) for n, row in enumerate(rows)]
    expected = count_experts(model, windows).mean()
    assert scorer.experts_per_token == pytest.approx(expected, abs=1e-12)
    assert 1 < expected < 5
