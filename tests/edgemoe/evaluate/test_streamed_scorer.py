"""A checkpoint that is scored layer by layer has the scores that it has in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from edgemoe.errors import CheckpointError
from edgemoe.evaluate.scorer import Request
from edgemoe.evaluate.subject import open_subject
from edgemoe.evaluate.torch_scorer import TorchScorer
from edgemoe.k_policy import KPolicy
from edgemoe.k_rule import KRule
from edgemoe.layerwise.provider import StreamedLayers
from edgemoe.models.checkpoint import load_model
from edgemoe.models.k_policy import put_k_policy
from edgemoe.models.opening import open_streamed
from edgemoe.models.tiny import write_tiny_checkpoint
from edgemoe.resume import WorkDirectory

if TYPE_CHECKING:
    from pathlib import Path

TEXTS = [Request((3,), (tuple(range(4, 4 + length)),)) for length in (9, 30, 4)]
CHOICES = [Request((5, 6, 7), ((8, 9), (10,), (11, 12, 13))), Request((4, 9), ((3,), (5,)))]


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "gpt_oss"])
def test_scores_are_those_of_the_whole_model(family: str, tmp_path: Path) -> None:
    write_tiny_checkpoint(family, tmp_path / "tiny")
    (tmp_path / "work").mkdir()
    streamed = open_streamed(tmp_path / "tiny")
    scorer = TorchScorer(StreamedLayers(streamed), work=WorkDirectory(tmp_path / "work"))
    whole = TorchScorer(load_model(tmp_path / "tiny"))
    assert scorer.max_length == whole.max_length
    for (one,), (other,) in zip(scorer.score(TEXTS), whole.score(TEXTS), strict=True):
        assert np.array_equal(one, other)
    for got, want in zip(scorer.score(CHOICES), whole.score(CHOICES), strict=True):
        for logprobs, expected in zip(got, want, strict=True):
            np.testing.assert_allclose(logprobs, expected, atol=1e-4)
    assert list((tmp_path / "work").iterdir()) == []
    # What was read is given back.
    assert all(parameter.is_meta for parameter in streamed.moe.model.parameters())


def test_experts_that_tokens_use_are_counted_as_in_memory(tmp_path: Path) -> None:
    write_tiny_checkpoint("qwen2_moe", tmp_path / "tiny")
    (tmp_path / "work").mkdir()
    streamed, whole = open_streamed(tmp_path / "tiny"), load_model(tmp_path / "tiny")
    used: list[float | None] = []
    for model in (streamed.moe, whole):
        layers = tuple(layer.index for layer in model.layers)
        rules = tuple(KRule(slots=4, top_p=0.3) for _ in layers)
        put_k_policy(model, KPolicy(name="top-p", layers=layers, rules=rules))
    for scorer in (
        TorchScorer(StreamedLayers(streamed), work=WorkDirectory(tmp_path / "work")),
        TorchScorer(whole),
    ):
        assert scorer.experts_per_token is None
        scorer.score(TEXTS)
        used.append(scorer.experts_per_token)
    assert used[0] == used[1]
    assert used[0] is not None
    assert used[0] != int(used[0])


def test_a_checkpoint_that_is_larger_than_memory_is_judged_as_one_that_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny_checkpoint("mixtral", tmp_path)
    scores = {}
    for limit in (1 << 40, 0):
        monkeypatch.setattr("edgemoe.models.opening.default_limit", lambda limit=limit: limit)
        for k_cap in (None, 1):
            with open_subject(tmp_path, k_cap=k_cap) as subject:
                scores[limit, k_cap] = np.concatenate(
                    [logprobs for (logprobs,) in subject.scorer.score(TEXTS)]
                )
                if limit == 0:
                    with pytest.raises(CheckpointError, match="must fit into memory"):
                        subject.generate("w3 w4", 3)
    assert np.array_equal(scores[0, None], scores[1 << 40, None])
    assert np.array_equal(scores[0, 1], scores[1 << 40, 1])
    assert not np.array_equal(scores[0, 1], scores[0, None])
