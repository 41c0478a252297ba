"""Sessions on a real engine, against a numpy forward pass without a cache."""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest
from tokenizers import Tokenizer as RawTokenizer

from edgemoe_runtime import BackendError, RequestError, Session, SessionClosedError
from edgemoe_runtime.backends.base import OpenRequest
from edgemoe_runtime.backends.onnxruntime import open_onnxruntime
from edgemoe_runtime.bundle.engine_cache import hash_file
from edgemoe_runtime.bundle.file_entry import FileEntry
from edgemoe_runtime.bundle.manifest_file import load_manifest, save_manifest
from edgemoe_runtime.device.machine import inspect_device

if TYPE_CHECKING:
    from collections.abc import Callable

Array = np.ndarray[Any, Any]
IDS = [int(i) for i in np.random.default_rng(5).integers(0, 256, 40)]


def log_likelihoods(logits: Array, ids: list[int]) -> Array:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    normalised = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    chosen: Array = normalised[np.arange(len(ids) - 1), ids[1:]]
    return chosen


def test_prefill_and_decode_equal_a_full_forward(bundle: Path, tiny_model: Any) -> None:
    manifest = load_manifest(bundle)
    request = OpenRequest(
        bundle=bundle, manifest=manifest, task="model", max_length=64, threads=1
    )
    expected = tiny_model.logits(IDS)
    cap = np.array([3, 3])
    with open_onnxruntime(request) as backend:
        for cuts in ([0, 40], [0, 1, 2, 40], [0, 17, 18, 19, 33, 34, 40]):
            backend.reset()
            rows = [
                np.array(backend.run(np.array(IDS[a:b]), cap, "all"))
                for a, b in itertools.pairwise(cuts)
            ]
            np.testing.assert_allclose(np.concatenate(rows), expected, atol=2e-4)
        backend.reset()
        backend.run(np.array(IDS[:20]), cap, "none")
        mark = backend.mark()
        for _ in range(2):
            backend.rewind(mark)
            assert backend.length == 20
            last = backend.run(np.array(IDS[20:]), cap, "last")
            np.testing.assert_allclose(last, expected[-1:], atol=2e-4)


@pytest.mark.parametrize("k_cap", [None, 1, 2, [1, 3]])
def test_token_logprobs_equal_a_full_forward(bundle: Path, tiny_model: Any, k_cap: Any) -> None:
    caps = {"None": (3, 3), "1": (1, 1), "2": (2, 2), "[1, 3]": (1, 3)}[str(k_cap)]
    expected = log_likelihoods(tiny_model.logits(IDS, caps), IDS)
    with Session.open(bundle, k_cap=k_cap, threads=1) as session:
        for start in (1, 7, len(IDS) - 1, len(IDS)):
            found = session.token_logprobs(IDS, start)
            assert found.dtype == np.float64
            np.testing.assert_allclose(found, expected[start - 1 :], atol=2e-4)


def test_long_prompts_run_in_chunks(
    bundle: Path, tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgemoe_runtime.backends.base._MAX_CHUNK_TOKENS", 7)
    with Session.open(bundle) as session:
        found = session.token_logprobs(IDS, 3)
        text = session.generate("A prompt that is longer than a chunk", max_new_tokens=8).tokens
    np.testing.assert_allclose(
        found, log_likelihoods(tiny_model.logits(IDS), IDS)[2:], atol=2e-4
    )
    assert text == greedy(tiny_model, bundle, "A prompt that is longer than a chunk", 8)


def greedy(tiny_model: Any, bundle: Path, prompt: str, count: int) -> tuple[int, ...]:
    with Session.open(bundle) as session:
        ids = session.encode(prompt)
    for _ in range(count):
        ids.append(int(tiny_model.logits(ids)[-1].argmax()))
    return tuple(ids[-count:])


def test_greedy_generation_equals_the_reference(bundle: Path, tiny_model: Any) -> None:
    with Session.open(bundle, deadline_ms=60_000) as session:
        answer = session.generate("Hallo Wölt", max_new_tokens=20)
        again = session.generate("Hallo Wölt", max_new_tokens=20)
        explanation = session.explain()
    assert answer.tokens == again.tokens == greedy(tiny_model, bundle, "Hallo Wölt", 20)
    assert answer.prompt_tokens == len("Hallo Wölt".encode())
    assert answer.new_tokens == 20
    assert answer.finish_reason == "length"
    assert str(answer) == answer.text
    assert answer.experts_per_token == 3.0
    assert answer.deadline_met is True
    assert answer.seconds >= answer.prefill_seconds > 0
    assert answer.ms_per_token == pytest.approx(1000 * answer.seconds / 20)
    document = json.loads(json.dumps(answer.to_dict()))
    assert document["k_cap"] == 3
    assert document["backend"] == "onnxruntime:CPUExecutionProvider"
    assert document["fallbacks"] == []
    assert explanation.requests == explanation.deadlines_met == 2
    assert explanation.ladder_position == "full"
    assert "onnxruntime:CPUExecutionProvider" in str(explanation)
    json.dumps(explanation.to_dict())


@pytest.mark.parametrize("options", [{}, {"temperature": 1.5, "seed": 3, "top_p": 0.9}])
def test_streaming_equals_not_streaming(bundle: Path, options: dict[str, Any]) -> None:
    with Session.open(bundle) as session:
        whole = session.generate("Grüße 🌍", max_new_tokens=40, **options)
        stream = session.generate("Grüße 🌍", max_new_tokens=40, stream=True, **options)
        with pytest.raises(RequestError, match="exhausted"):
            _ = stream.generation
        pieces = list(stream)
    assert "".join(pieces) == whole.text == stream.generation.text
    assert stream.generation.tokens == whole.tokens
    assert all(pieces)


def test_sampling_repeats_for_a_seed(bundle: Path) -> None:
    with Session.open(bundle) as session:
        runs = [
            session.generate("abc", max_new_tokens=12, temperature=2.0, seed=seed).tokens
            for seed in (1, 1, 2)
        ]
    assert runs[0] == runs[1] != runs[2]


def test_stop_strings_and_end_tokens_end_the_text(
    bundles: dict[str, Path], build_bundle: Callable[..., Path], tiny_model: Any
) -> None:
    with Session.open(bundles["concat"]) as session:
        options: dict[str, Any] = {"temperature": 1.0, "seed": 0, "max_new_tokens": 60}
        text = session.generate("abc", **options).text
        stop = text[20:23]
        expected = text[: text.index(stop)]
        answer = session.generate("abc", stop=[stop, "never there"], **options)
        pieces = list(session.generate("abc", stop=stop, stream=True, **options))
    assert answer.text == expected == "".join(pieces)
    assert answer.finish_reason == "stop"
    tokens = greedy(tiny_model, bundles["concat"], "abc", 20)
    end = tokens[10]
    with Session.open(build_bundle(eos_token_ids=(end,))) as session:
        answer = session.generate("abc", max_new_tokens=20)
    assert answer.finish_reason == "eos"
    assert answer.tokens == tokens[: tokens.index(end) + 1]


def test_the_cache_limits_the_answer_and_refuses_the_prompt(bundle: Path) -> None:
    with Session.open(bundle, max_length=16) as session:
        answer = session.generate("0123456789", max_new_tokens=50)
        assert answer.finish_reason == "max_length"
        # the last token is chosen but never run, so it needs no room
        assert answer.new_tokens == 7
        with pytest.raises(RequestError, match="max_length 16 tokens, got 17"):
            session.generate("0123456789abcdefg")
        # and a last token that is only scored needs none either
        assert session.token_logprobs(range(17), 1).shape == (16,)
        with pytest.raises(RequestError, match="max_length 16 tokens"):
            session.token_logprobs(range(18), 1)
    with pytest.raises(RequestError, match=r"max_length must be in \[1, 96\]"):
        Session.open(bundle, max_length=97)


def test_classify_and_score_equal_a_full_forward(bundle: Path, tiny_model: Any) -> None:
    choices = ["bearing", "alignment", "no"]
    with Session.open(bundle) as session:
        answer = session.classify("Vibration", choices, template="{text} at station 4: ")
        per_token = session.classify("Vibration", choices, template="{text}:", by="token")
        single = [session.score("Vibration at station 4:", f" {choice}") for choice in choices]
        prompt = session.encode("Vibration at station 4:")
        ids = [prompt + session.encode(f" {choice}") for choice in choices]
    expected = [
        log_likelihoods(tiny_model.logits(sequence), sequence)[len(prompt) - 1 :].sum()
        for sequence in ids
    ]
    # One token per character here; the space counts to the choice on both sides of the seam.
    assert [score.log_likelihood for score in answer.scores] == pytest.approx(
        expected, abs=1e-3
    )
    assert [float(score) for score in single] == pytest.approx(expected, abs=1e-3)
    assert answer == choices[int(np.argmax(expected))]
    assert answer.choice_index == int(np.argmax(expected))
    assert answer.margin > 0
    assert per_token.values == tuple(score.per_token for score in per_token.scores)
    json.dumps(answer.to_dict())


def test_two_tasks_in_one_bundle(build_bundle: Callable[..., Path]) -> None:
    folder = build_bundle(["alpha", "beta"])
    with pytest.raises(RequestError, match="alpha, beta"):
        Session.open(folder)
    with pytest.raises(RequestError, match="'gamma'"):
        Session.open(folder, task="gamma")
    with Session.open(folder, task="beta") as session:
        assert session.explain().task == "beta"


def test_a_deadline_is_measured_not_promised(bundle: Path) -> None:
    with Session.open(bundle, deadline_ms=1e-6) as session:
        assert session.generate("abc", max_new_tokens=2).deadline_met is False
        assert session.classify("abc", ["x", "y"]).deadline_met is False
        assert session.explain().deadlines_met == 0


def test_a_stream_notices_that_its_cache_was_taken(bundle: Path) -> None:
    with Session.open(bundle) as session:
        stream = session.generate("abc", max_new_tokens=50, stream=True)
        next(stream)
        session.generate("xyz", max_new_tokens=1)
        with pytest.raises(RequestError, match="read to its end"):
            list(stream)


def test_a_stream_that_failed_is_no_answer(bundle: Path) -> None:
    with Session.open(bundle) as session:
        stream = session.generate("one", max_new_tokens=9, stream=True)
        next(stream)
        session.generate("two", max_new_tokens=1)
        with pytest.raises(RequestError, match="read to its end"):
            list(stream)
        assert list(stream) == []
        with pytest.raises(RequestError, match="exhausted"):
            _ = stream.generation
        assert session.explain().requests == 1


def test_the_cap_of_an_answer_is_the_one_it_ran_with(bundle: Path) -> None:
    with Session.open(bundle) as session:
        # A first token that is no whole character gives no piece before the end.
        for prompt in "abcdefghijklmnop":
            session.set_k_cap(None)
            stream = session.generate(prompt, max_new_tokens=1, stream=True)
            if next(stream, None) is not None:
                break
        session.set_k_cap(cast("Any", np.array([1, 2])))
        assert list(stream) == []
        assert stream.generation.k_cap == (3, 3)
        assert session.generate("a", max_new_tokens=1).k_cap == (1, 2)


def test_nothing_before_the_completions_is_refused(bundle: Path) -> None:
    with Session.open(bundle) as session:
        with pytest.raises(RequestError, match="begin with the same token"):
            session.classify("", ["alpha", "beta"], template="{text}")
        same = session.classify("", ["ab", "ac"], template="{text}")
        assert [score.tokens for score in same.scores] == [1, 1]


def test_tokens_beyond_the_vocabulary_are_refused(build_bundle: Callable[..., Path]) -> None:
    folder = build_bundle()
    tokenizer = RawTokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    manifest = load_manifest(folder)
    path = folder / "tokenizer.json"
    entry = FileEntry(sha256=hash_file(path), size=path.stat().st_size)
    manifest = replace(manifest, files={**manifest.files, "tokenizer.json": entry})
    save_manifest(manifest, folder)
    with Session.open(folder) as session, pytest.raises(RequestError, match=r"\[0, 257\)"):
        session.classify("x", ["<extra>", "none"])


def test_a_backend_may_be_closed_twice(bundle: Path) -> None:
    manifest = load_manifest(bundle)
    request = OpenRequest(
        bundle=bundle, manifest=manifest, task="model", max_length=8, threads=None
    )
    with open_onnxruntime(request) as backend:
        backend.close()


def test_a_half_removed_onnxruntime_is_a_reason(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", ModuleType("onnxruntime"))
    with pytest.raises(BackendError, match="cannot be imported"):
        Session.open(bundle)
    assert inspect_device().providers == ()


def test_k_cap_can_be_changed_between_requests(bundle: Path) -> None:
    with Session.open(bundle) as session:
        full = session.token_logprobs(IDS, 1)
        session.set_k_cap(1)
        assert session.explain().ladder_position == "low"
        assert session.generate("abc", max_new_tokens=1).experts_per_token == 1.0
        assert not np.allclose(session.token_logprobs(IDS, 1), full)
        session.set_k_cap([1, 2])
        assert session.explain().experts_per_token == 1.5
        assert session.explain().ladder_position is None
        session.set_k_cap(None)
        np.testing.assert_array_equal(session.token_logprobs(IDS, 1), full)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": 0}, "top_k"),
        ({"seed": -1}, "seed"),
        ({"stop": [""]}, "stop"),
    ],
)
def test_generate_refuses(
    bundles: dict[str, Path], arguments: dict[str, Any], message: str
) -> None:
    with (
        Session.open(bundles["concat"]) as session,
        pytest.raises(RequestError, match=message),
    ):
        session.generate("abc", **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k_cap": 0}, r"\[1, 3\] \(top_k of this task\), got 0"),
        ({"k_cap": 4}, r"\[1, 3\] \(top_k of this task\), got 4"),
        ({"k_cap": True}, "whole number"),
        ({"k_cap": [1]}, r"one value per MoE layer \(2\), got 1"),
        ({"k_cap": 1.5}, "whole number"),
        ({"threads": 0}, "threads"),
        ({"deadline_ms": 0}, "deadline_ms"),
        ({"backend": "tflite"}, "onnxruntime, tensorrt"),
        ({"providers": ["npu"]}, "cpu, cuda"),
        ({"providers": []}, "at least one"),
        ({"providers": ["cpu"], "backend": "tensorrt"}, "Leave"),
    ],
)
def test_open_refuses(
    bundles: dict[str, Path], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        Session.open(bundles["concat"], **arguments)


def test_other_requests_refuse(bundles: dict[str, Path]) -> None:
    with Session.open(bundles["concat"]) as session:
        for choices in ([], "abc", ["a", "a"], ["a", ""]):
            with pytest.raises(RequestError):
                session.classify("x", choices)
        with pytest.raises(RequestError, match="template"):
            session.classify("x", ["a"], template="no place")
        with pytest.raises(RequestError, match="completion"):
            session.score("x", "")
        with pytest.raises(RequestError, match="start"):
            session.token_logprobs(IDS, 0)
        with pytest.raises(RequestError, match=r"\[0, 257\)"):
            session.token_logprobs([1, 257], 1)
        with pytest.raises(RequestError, match="at least one token"):
            session.token_logprobs([], 1)
        # an empty prompt starts a document
        assert session.generate("", max_new_tokens=1).prompt_tokens == 1
    session.close()
    with pytest.raises(SessionClosedError):
        session.generate("abc")
    assert Path(session.explain().bundle) == bundles["concat"]
