"""Sessions that move along a k ladder, with the real engine and a recorded machine."""

from __future__ import annotations

import itertools
import json
import logging
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner

from edgemoe.cli import main
from edgemoe_runtime import Limits, Session
from edgemoe_runtime.adaptive_k import rung_cost
from edgemoe_runtime.bundle.k_ladder import KRung, RungCost, RungQuality
from edgemoe_runtime.bundle.manifest_file import load_manifest, save_manifest

if TYPE_CHECKING:
    from pathlib import Path

CHOICES = ["bearing", "alignment", "none"]
QUALITY = RungQuality(
    metric="accuracy", value=0.5, ci95=(0.4, 0.6), drop=0.0, drop_ci95=(0.0, 0.1), lines=9
)
FULL = KRung(name="full", k_cap=(3, 3), quality=QUALITY, cost=RungCost(1.0, 1.0))
LOW = KRung(
    name="low",
    k_cap=(1, 1),
    quality=replace(QUALITY, margin=0.0),
    cost=RungCost(0.5, 0.5),
)


def with_ladder(folder: Path, *rungs: KRung, **more: Any) -> Path:
    manifest = load_manifest(folder)
    entry = replace(manifest.tasks["model"], k_ladder=rungs or None, **more)
    save_manifest(replace(manifest, tasks={"model": entry}), folder)
    assert load_manifest(folder).tasks["model"] == entry
    return folder


@pytest.fixture
def hot(tmp_path: Path) -> Path:
    """A recorded machine whose GPU throttles."""
    device = tmp_path / "hot/sys/class/thermal/cooling_device0"
    device.mkdir(parents=True)
    (device / "type").write_text("gpu-throttle-alert\n")
    (device / "cur_state").write_text("1\n")
    return tmp_path / "hot"


def test_a_hot_machine_gets_fewer_experts_and_says_so(
    build_bundle: Any, hot: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = with_ladder(build_bundle(), FULL, LOW)
    caplog.set_level(logging.INFO, logger="edgemoe_runtime")
    with Session.open(folder, k_cap=1) as session:
        expected = session.generate("It hums", max_new_tokens=5)
    with Session.open(folder, adapt=True, sensors_root=hot) as session:
        answer = session.generate("It hums", max_new_tokens=5)
        explanation = session.explain()
        # What evaluates asks for the full k.
        full = session.token_logprobs([5, 6, 7, 8], 1)
    assert answer.tokens == expected.tokens
    assert answer.experts_per_token == 1.0
    assert answer.k_cap == (1, 1)
    assert [move.phase for move in answer.k_moves] == ["prompt", "decode"]
    assert answer.k_moves[0].reason == "gpu-throttle-alert is active"
    assert answer.to_dict()["k_moves"][0] == {  # type: ignore[index]
        "phase": "prompt",
        "from": "full",
        "to": "low",
        "reason": "gpu-throttle-alert is active",
    }
    assert explanation.ladder == ("full", "low")
    assert explanation.ladder_position == "low"
    assert explanation.k_move_count == 2
    assert "prompt: full to low: gpu-throttle-alert is active" in str(explanation)
    assert "gpu-throttle-alert" in caplog.text
    json.dumps(explanation.to_dict())
    with Session.open(folder) as session:
        assert session.token_logprobs([5, 6, 7, 8], 1).tolist() == full.tolist()
        assert session.explain().ladder == ("full",)


@pytest.mark.parametrize(
    ("options", "moves"),
    [
        ({}, 0),
        ({"adapt": False, "deadline_ms": 1e6}, 0),
        ({"k_cap": 3, "deadline_ms": 1e6}, 0),
        ({"deadline_ms": 1e6}, 1),
        ({"token_ms": 1e6}, 1),
        ({"adapt": True}, 1),
    ],
)
def test_who_adapts(build_bundle: Any, hot: Path, options: Any, moves: int) -> None:
    folder = with_ladder(build_bundle(), FULL, LOW)
    with Session.open(folder, sensors_root=hot, **options) as session:
        assert len(session.classify("It hums", CHOICES).k_moves) == moves


@pytest.mark.parametrize(("margin", "again"), [(0.0, False), (1e6, True), (None, False)])
def test_a_choice_of_low_confidence_is_escalated(
    build_bundle: Any, hot: Path, margin: float | None, again: bool
) -> None:
    low = replace(LOW, quality=replace(QUALITY, margin=margin))
    folder = with_ladder(build_bundle(), FULL, low)
    with Session.open(folder, k_cap=3 if again else 1) as session:
        expected = session.classify("It hums", CHOICES)
    with Session.open(folder, adapt=True, sensors_root=hot) as session:
        answer = session.classify("It hums", CHOICES)
        explanation = session.explain()
    assert answer.values == expected.values
    assert answer.experts_per_token == (3.0 if again else 1.0)
    assert explanation.asked_again == again
    if again:
        (fallback,) = answer.fallbacks
        assert (fallback.kind, fallback.backend) == ("confidence", "low")
        assert "more than 1e+06 needed: asked again at full k" in fallback.reason
        assert fallback in explanation.fallbacks
        assert answer.to_dict()["fallbacks"] == [fallback.to_dict()]
    else:
        assert answer.fallbacks == ()


@pytest.mark.parametrize(("margin", "again"), [(-1.0, False), (1e6, True), (None, False)])
def test_a_text_of_low_confidence_is_escalated(
    build_bundle: Any, hot: Path, margin: float | None, again: bool
) -> None:
    low = replace(LOW, quality=replace(QUALITY, metric="perplexity", margin=margin))
    folder = with_ladder(build_bundle(), FULL, low)
    with Session.open(folder, k_cap=3 if again else 1) as session:
        expected = session.generate("It hums", max_new_tokens=6)
        choice = session.classify("It hums", CHOICES)
    with Session.open(folder, adapt=True, sensors_root=hot) as session:
        answer = session.generate("It hums", max_new_tokens=6)
        explanation = session.explain()
        stream = session.generate("It hums", max_new_tokens=6, stream=True)
        assert "".join(stream) == stream.generation.text
        assert stream.generation.k_cap == (1, 1)
        assert stream.generation.fallbacks == ()
        # The margin of texts says nothing of choices.
        compared = session.classify("It hums", CHOICES)
        assert compared.fallbacks == ()
        assert (compared.values == choice.values) is not again
    assert (answer.tokens, answer.text) == (expected.tokens, expected.text)
    assert answer.experts_per_token == (3.0 if again else 1.0)
    assert explanation.requests == 1
    assert explanation.asked_again == again
    assert [move.after for move in answer.k_moves] == ["low", "low"]
    if again:
        (fallback,) = answer.fallbacks
        assert fallback.kind == "confidence"
        assert "more than 1e+06 needed: asked again at full k" in fallback.reason


def test_a_deadline_that_no_rung_can_keep_is_reported(
    build_bundle: Any, caplog: pytest.LogCaptureFixture
) -> None:
    folder = with_ladder(build_bundle(), FULL, LOW)
    low = replace(LOW, quality=replace(QUALITY, margin=1e6))
    with Session.open(folder, deadline_ms=0.001) as session:
        for _ in range(2):
            answer = session.generate("It hums", max_new_tokens=12)
        assert session.classify("It hums", CHOICES).deadline_met is False
    assert answer.deadline_met is False
    assert [fallback.kind for fallback in answer.fallbacks] == ["deadline"]
    assert "no rung is fast enough for the deadline" in answer.fallbacks[0].reason
    assert answer.new_tokens == 12
    assert "no rung is fast enough" in caplog.text
    with Session.open(with_ladder(folder, FULL, low), deadline_ms=0.001) as session:
        for _ in range(3):
            last = session.classify("It hums", CHOICES)
        assert [f.kind for f in last.fallbacks] == ["deadline", "confidence"]
        assert "no time for full k" in last.fallbacks[1].reason
        assert session.explain().asked_again == 0
    low = replace(low, quality=replace(QUALITY, metric="perplexity", margin=1e6))
    with Session.open(with_ladder(folder, FULL, low), deadline_ms=0.001) as session:
        for _ in range(3):
            text = session.generate("It hums", max_new_tokens=9)
        assert [f.kind for f in text.fallbacks] == ["deadline", "confidence"]
        assert "no time for full k" in text.fallbacks[1].reason


@pytest.mark.parametrize(("costs", "ladder"), [((1.0, 0.5), 2), ((1.0, 0.995), 1)])
def test_rungs_without_a_cost_are_timed_where_they_run(
    build_bundle: Any, monkeypatch: pytest.MonkeyPatch, costs: Any, ladder: int
) -> None:
    # A model this small takes as long on each rung.
    measured = [RungCost(cost, cost) for cost in costs]
    monkeypatch.setattr(rung_cost, "measure_costs", lambda *_: measured)
    rungs = (replace(FULL, cost=None), replace(LOW, cost=None))
    folder = with_ladder(build_bundle(), *rungs)
    with Session.open(folder, token_ms=1e6) as session:
        assert session.explain().ladder == ("full", "low")[:ladder]
        answer = session.generate("It hums", max_new_tokens=5)
    with Session.open(folder) as session:
        assert session.generate("It hums", max_new_tokens=5).tokens == answer.tokens


def test_an_answer_is_of_low_confidence_if_any_of_it_ran_on_a_lower_rung(
    build_bundle: Any, hot: Path
) -> None:
    low = replace(LOW, quality=replace(QUALITY, metric="perplexity", margin=1e6))
    folder = with_ladder(build_bundle(), FULL, low)
    limits = Limits(climb_seconds=0.0, relief_seconds=0.0)
    with Session.open(folder) as session:
        expected = session.generate("It hums", max_new_tokens=20).tokens
    state = hot / "sys/class/thermal/cooling_device0/cur_state"
    with Session.open(folder, sensors_root=hot, limits=limits) as session:
        controller = session._service.state.controller
        # It cools down in the middle of the answer, and is read with every token.
        read, reads = controller._config.read, iter(range(1000))
        assert read is not None

        def cool() -> Any:
            controller._read_at = None
            if next(reads) == 8:
                state.write_text("0\n")
            return read()

        controller._config = replace(controller._config, read=cool)
        answer = session.generate("It hums", max_new_tokens=20)
    assert [f.kind for f in answer.fallbacks] == ["confidence"]
    assert answer.fallbacks[0].backend == "low"
    assert answer.tokens == expected


def test_a_second_answer_that_would_be_late_is_given_up(
    build_bundle: Any, hot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    low = replace(LOW, quality=replace(QUALITY, metric="perplexity", margin=1e6))
    folder = with_ladder(build_bundle(), FULL, low)
    with Session.open(folder, k_cap=1) as session:
        expected = session.generate("It hums", max_new_tokens=6)
    with Session.open(folder, deadline_ms=60_000, sensors_root=hot) as session:
        # There is time for the prompt and as many tokens, as it seems, and then there is none.
        answers = iter([True, True, True, False])
        monkeypatch.setattr(
            session._service.state.controller, "full_k_fits", lambda *_: next(answers)
        )
        answer = session.generate("It hums", max_new_tokens=6)
        assert session.explain().asked_again == 0
    assert (answer.tokens, answer.text) == (expected.tokens, expected.text)
    assert answer.experts_per_token == 1.0
    assert answer.k_cap == (1, 1)
    (fallback,) = answer.fallbacks
    assert "no time for full k" in fallback.reason


def test_choices_by_token_are_of_low_confidence_where_totals_disagree(
    build_bundle: Any, hot: Path
) -> None:
    low = replace(LOW, quality=replace(QUALITY, margin=0.0))
    folder = with_ladder(build_bundle(), FULL, low)
    choices = ["none", "none none"]
    with Session.open(folder, adapt=True, sensors_root=hot) as session:
        total = session.classify("It hums", choices)
        token = session.classify("It hums", choices, by="token")
    assert total.fallbacks == ()
    # By token the longer one is ahead, and nobody measured how far that must be.
    assert total != token
    assert [f.kind for f in token.fallbacks] == ["confidence"]


def test_a_stream_reports_itself_alone(build_bundle: Any, hot: Path) -> None:
    folder = with_ladder(build_bundle(), FULL, LOW)
    with Session.open(folder, deadline_ms=0.001) as session:
        session.generate("It hums", max_new_tokens=3)
        session.classify("It hums", CHOICES)
    with Session.open(folder, adapt=True) as session:
        stream = session.generate("It hums", max_new_tokens=3, stream=True)
        pieces = list(itertools.islice(stream, 3))
        state = stream._progress.fallbacks
        session.set_k_cap(1)
        pieces += list(stream)
    assert stream.generation.k_cap == (3, 3)
    assert stream.generation.fallbacks == state == ()


def test_a_deadline_that_was_met_was_not_infeasible(build_bundle: Any) -> None:
    folder = with_ladder(build_bundle(), FULL, LOW)
    with Session.open(folder, deadline_ms=60_000) as session:
        # A million tokens do not fit into the cache, let alone into a minute.
        for _ in range(2):
            answer = session.generate("It hums", max_new_tokens=10**6)
        assert answer.finish_reason in {"max_length", "eos"}
        assert answer.deadline_met
        assert answer.fallbacks == ()
        assert session.explain().ladder_position == "full"


def test_late_tokens_are_counted(build_bundle: Any) -> None:
    folder = with_ladder(build_bundle(), FULL, LOW)
    with Session.open(folder, token_ms=1e-4) as session:
        answer = session.generate("It hums", max_new_tokens=7)
        explanation = session.explain()
    assert answer.late_tokens == answer.new_tokens - 1 == explanation.late_tokens
    assert answer.to_dict()["token_ms"] == explanation.token_ms == 1e-4
    assert "6 new tokens later than 0.0001 ms" in str(explanation)


@pytest.mark.parametrize("stream", [False, True])
def test_run_escalates_but_for_a_stream(
    build_bundle: Any, hot: Path, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    low = replace(LOW, quality=replace(QUALITY, metric="perplexity", margin=1e6))
    folder = with_ladder(build_bundle(), FULL, low)
    opened = partial(Session.open, sensors_root=hot)
    monkeypatch.setattr(Session, "open", opened)
    words = ["run", str(folder), "--prompt", "It hums", "--max-new-tokens", "5", "--adapt"]
    words += ["--json", *(["--stream"] if stream else [])]
    result = CliRunner().invoke(main, words, catch_exceptions=False)
    answer = json.loads(result.stdout)
    kinds = [fallback["kind"] for fallback in answer["fallbacks"]]
    assert kinds == ([] if stream else ["confidence"])
    assert answer["experts_per_token"] == (1.0 if stream else 3.0)


def test_the_fallback_table_replaces_a_missing_choice_of_k(build_bundle: Any) -> None:
    folder = with_ladder(build_bundle(), FULL, LOW, k_table=(2, 1))
    with Session.open(folder, k_cap=[2, 1]) as session:
        expected = session.generate("It hums", max_new_tokens=5)
    with Session.open(folder, adapt=True) as session:
        answer = session.generate("It hums", max_new_tokens=5)
        assert session.explain().k_cap == (2, 1)
    assert answer.tokens == expected.tokens
    assert answer.experts_per_token == 1.5
    (fallback,) = answer.fallbacks
    assert fallback.kind == "allocator"
    assert "no output experts_used" in fallback.reason


def test_times_are_those_of_finished_requests(build_bundle: Any) -> None:
    with Session.open(build_bundle()) as session:
        answers = [session.generate("It hums", max_new_tokens=count) for count in (3, 5)]
        explanation = session.explain()
    assert explanation.requests == 2
    assert explanation.new_tokens == 8
    assert explanation.mean_seconds == pytest.approx(sum(a.seconds for a in answers) / 2)
    assert "4 new tokens each" in str(explanation)
