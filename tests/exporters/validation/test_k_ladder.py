"""The k ladder of an export: what its rungs lose and cost, and which are worth having."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgemoe.errors import QualityGateError
from edgemoe.evaluate.drop import paired_drop
from edgemoe.evaluate.evaluation import Evaluation, evaluate
from edgemoe.evaluate.subject import open_subject
from edgemoe.models import limit_k, load_model, load_tokenizer
from edgemoe.models.tiny import write_tiny_checkpoint
from edgemoe.tasks import ChoiceRecord, TaskFile
from edgemoe_exporters.export import export_bundle
from edgemoe_exporters.request import ExportRequest
from edgemoe_exporters.validation.k_ladder import LadderTask, floor_of, list_caps, measure_rungs
from edgemoe_exporters.validation.margins import Answers, answers_of_choices, find_margin
from edgemoe_exporters.validation.quality_gate import check_quality, split_task
from edgemoe_runtime import Session
from edgemoe_runtime.bundle.k_ladder import RungCost
from edgemoe_runtime.bundle.manifest_file import load_manifest

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


def of_lines(value: float) -> Evaluation:
    """A perplexity of thirty lines of one token, all alike."""
    losses = (float(np.log(value)),) * 30
    return replace(score(value), n=30, line_losses=losses, line_tokens=(1,) * 30)


def score(value: float, metric: str = "perplexity") -> Evaluation:
    return Evaluation(
        task="t",
        metric=metric,  # type: ignore[arg-type]
        value=value,
        ci95=(value, value),
        n=1,
        perplexity=value,
        tokens=1,
    )


def chosen(*values: tuple[float, ...]) -> Answers:
    return answers_of_choices(replace(score(0.5, "accuracy"), line_values=values))


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6))
def test_caps_go_down_from_the_full_k_to_one(full: list[int]) -> None:
    caps = list_caps(full)
    assert caps[0] == tuple(full)
    assert caps[-1] == (1,) * len(full) or max(full) == 1
    assert len(caps) == min(8, max(full))
    for before, after in itertools.pairwise(caps):
        assert max(after) < max(before)
        assert all(1 <= b <= a for a, b in zip(before, after, strict=True))


@given(
    st.lists(
        st.tuples(
            st.integers(1, 6), st.lists(st.floats(1, 99), min_size=6, max_size=8).map(tuple)
        ),
        min_size=1,
        max_size=6,
    )
)
def test_layers_that_need_experts_keep_them(
    layers: list[tuple[int, tuple[float, ...]]],
) -> None:
    full, needs = [k for k, _ in layers], [need for _, need in layers]
    caps = list_caps(full, needs)
    assert caps[0] == tuple(full)
    assert caps[-1] == (1,) * len(full)
    assert len(caps) <= 8
    for before, after in itertools.pairwise(caps):
        assert sum(after) < sum(before)
    for cap in caps:
        assert all(1 <= k <= own for k, own in zip(cap, full, strict=True))
    for cap in caps[1:]:
        # Of all tables with as many experts none has a smaller sum of needs.
        choices = itertools.product(*(range(1, own + 1) for own in full))
        sums = [
            sum(need[k - 1] for need, k in zip(needs, table, strict=True))
            for table in choices
            if sum(table) == sum(cap)
        ]
        spent = sum(need[k - 1] for need, k in zip(needs, cap, strict=True))
        assert spent == pytest.approx(min(sums))


def test_margins_are_the_largest_of_changed_answers() -> None:
    full = chosen((0.0, -1.0, -5.0), (-3.0, -1.0, -2.0), (0.0, -9.0, -9.0))
    assert find_margin(full, full) == -1
    other = chosen((-2.0, -1.5, -9.0), (-1.0, -4.0, -9.0), (0.0, -0.1, -9.0))
    # Line 1 changed with a margin of 0.5, line 2 with 3; line 3 did not.
    assert find_margin(full, other) == pytest.approx(3.0)
    assert other.margins == pytest.approx([0.5, 3.0, 0.1])
    assert chosen((-2.0,)).margins == [float("inf")]


def test_a_text_is_another_when_a_quarter_of_its_tokens_is() -> None:
    tokens = (np.arange(8), np.arange(8), np.arange(8))
    full = Answers(tokens, np.array([1.0, 2.0, 3.0]))
    two, three = np.arange(8), np.arange(8)
    two[:2] = three[:3] = 99
    here = Answers((two, three, two), np.array([0.5, 0.7, 0.9]))
    assert find_margin(full, here) == pytest.approx(0.7)


def test_floors_count_what_is_lost_already() -> None:
    before, after = of_lines(10), of_lines(11)
    assert floor_of(None, before, after) == 0.1
    # 10 -> 11 -> 12 is all that 20% allow; lines that all lose alike leave no doubt.
    assert 11 * (1 + floor_of(0.2, before, after)) == pytest.approx(12)
    unsure = replace(after, line_losses=tuple(np.log(11) + np.linspace(-0.1, 0.1, 30)))
    assert floor_of(0.2, before, unsure) < floor_of(0.2, before, after)


@pytest.mark.parametrize(("surely", "names"), [(False, ["full", "k1"]), (True, ["full"])])
def test_a_limit_is_of_what_a_rung_may_lose(surely: bool, names: list[str]) -> None:
    class Task:
        def evaluate(self, _: object, k_cap: Sequence[int]) -> tuple[Evaluation, Answers]:
            found = of_lines(10)
            if k_cap[0] == 1:
                losses = np.log(10.2) + np.linspace(-1, 1, 30)
                found = replace(found, value=10.2, line_losses=tuple(losses))
            return found, Answers((np.zeros(1, np.int64),), np.zeros(1))

    task: Any = Task()
    rungs = measure_rungs(None, task, (2, 2), 0.05, surely=surely)  # type: ignore[arg-type]
    assert [rung.name for rung in rungs] == names


class Told:
    """Evaluates rungs with known results: perplexities by the cap of the first layer."""

    def __init__(self, found: dict[int, float]) -> None:
        self.found = found

    def evaluate(self, _: object, k_cap: Sequence[int]) -> tuple[Evaluation, Answers]:
        losses = (np.log(self.found[k_cap[0]]),) * 4
        found = replace(
            score(self.found[k_cap[0]]), n=4, line_losses=losses, line_tokens=(1,) * 4
        )
        return found, Answers((np.arange(3),) * 4, np.ones(4))


@pytest.mark.parametrize(
    ("floor", "names"),
    [
        (0.1, ["full", "k4"]),
        (0.01, ["full"]),
        (0.02, ["full", "k4"]),
        (0.3, ["full", "k4", "k3", "k2", "k1"]),
    ],
)
def test_the_first_rung_that_loses_too_much_ends_the_ladder(
    floor: float, names: list[str]
) -> None:
    # k2 is better than k3 by chance, and behind the floor all the same.
    task: Any = Told({5: 10.0, 4: 10.2, 3: 12.0, 2: 10.1, 1: 12.5})
    rungs = measure_rungs(None, task, (5, 5), floor)  # type: ignore[arg-type]
    assert [rung.name for rung in rungs] == names
    first = rungs[0].quality
    assert first is not None
    assert (first.drop, first.drop_ci95) == (0.0, (0.0, 0.0))


def test_a_drop_as_large_as_is_allowed_is_allowed(choices: Path) -> None:
    held_out = TaskFile.load("choices", choices)
    before, after = of_lines(10), of_lines(11)
    assert check_quality(held_out, before, after, after.value / before.value - 1, 96).passed
    with pytest.raises(QualityGateError, match=r"at most --max-drop 0\.09 with 95% conf"):
        check_quality(held_out, before, after, 0.09, 96)


def test_rungs_are_evaluated_on_thirty_choices_where_there_are_as_many(
    checkpoint: Path, tmp_path: Path
) -> None:
    path = tmp_path / "long.jsonl"
    lines = [
        {
            "prompt": " ".join(f"w{(line * 7 + word) % 60 + 3}" for word in range(150)),
            "choices": [" w5", " w40"],
            "answer": line % 2,
        }
        for line in range(40)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    held_out, tokenizer = TaskFile.load("long", path), load_tokenizer(checkpoint)
    with open_subject(checkpoint) as whole:
        for most, least, limit in ((10**6, 30, 40), (3000, 15, 20)):
            task = LadderTask(held_out, tokenizer, 256, most)
            found = evaluate(whole.scorer, held_out, tokenizer, max_tokens=task.rung_tokens())
            assert least <= found.n <= limit


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "tiny"
    write_tiny_checkpoint("qwen3_moe", path, num_experts_per_tok=4)
    return path


@pytest.fixture(scope="module")
def choices(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("task") / "choices.jsonl"
    lines = [
        {
            "prompt": " ".join(f"w{(line * 7 + word) % 60 + 3}" for word in range(9)),
            "choices": [" w5 w6", " w40", " w17 w9"],
            "answer": line % 3,
        }
        for line in range(40)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, choices: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("bundle") / "bundle"
    request = ExportRequest(
        model=checkpoint,
        output=output,
        target="cpu",
        precision="fp32",
        tasks={"choices": choices},
        max_drop=1.0,
        accept_weak_evidence=True,
        keep=1.0,
        speed=False,
    )
    export_bundle(request)
    return output


@pytest.mark.fused
def test_an_export_measures_what_its_rungs_lose(
    bundle: Path, choices: Path, checkpoint: Path
) -> None:
    manifest = load_manifest(bundle)
    assert [rung.name for rung in manifest.k_ladder] == ["full"]
    ladder = manifest.tasks["choices"].k_ladder
    assert ladder is not None
    assert ladder[0].name == "full"
    assert ladder[0].k_cap == (4,) * len(manifest.model.moe_layers)
    assert ladder[0].cost == RungCost(1.0, 1.0)
    _, held_out = split_task(TaskFile.load("choices", choices))
    with open_subject(checkpoint) as whole:
        best = evaluate(whole.scorer, held_out, whole.tokenizer, max_tokens=2048)
    for each in ladder:
        with open_subject(checkpoint, k_cap=each.k_cap) as small:
            expected = evaluate(small.scorer, held_out, small.tokenizer, max_tokens=2048)
        assert each.quality is not None
        assert each.quality.value == expected.value
        assert each.quality.lines == 10
        assert each.quality.drop == pytest.approx(paired_drop(best, expected).value)
        if each is ladder[0]:
            assert (each.quality.margin, each.quality.asked_again) == (None, 0)
            continue
        answers = answers_of_choices(expected)
        margin = find_margin(answers_of_choices(best), answers)
        assert each.quality.margin == pytest.approx(margin, abs=1e-3)
        again = [line <= margin + 1e-3 for line in answers.margins]
        assert each.quality.asked_again == pytest.approx(sum(again) / len(again))


@pytest.mark.fused
def test_answers_above_the_margin_are_those_of_the_full_k(bundle: Path, choices: Path) -> None:
    _, held_out = split_task(TaskFile.load("choices", choices))
    ladder = load_manifest(bundle).tasks["choices"].k_ladder
    assert ladder is not None
    with Session.open(bundle) as session:
        for each in ladder[1:]:
            assert each.quality is not None
            assert each.quality.margin is not None
            for record in held_out.records:
                assert isinstance(record, ChoiceRecord)
                answers = []
                for cap in (None, each.k_cap):
                    session.set_k_cap(cap)
                    answers.append(
                        session.classify(record.prompt, record.choices, template="{text}")
                    )
                if answers[1].margin > each.quality.margin + 1e-3:
                    assert answers[0] == answers[1]


@pytest.mark.slow
@pytest.mark.fused
def test_who_wants_no_ladder_gets_none(checkpoint: Path, choices: Path, tmp_path: Path) -> None:
    request = ExportRequest(
        model=checkpoint,
        output=tmp_path / "a",
        target="jetson-orin",
        tasks={"choices": choices},
        keep=1.0,
    )
    told = export_bundle(request).to_json()["tasks"]["choices"]["k_ladder"]
    # Of a target that is not at hand quality is measured, time is not.
    ladder = load_manifest(tmp_path / "a").tasks["choices"].k_ladder
    assert ladder is not None
    assert all(each.cost is None and each.quality is not None for each in ladder)
    assert told == [each.to_json() for each in ladder]
    without = export_bundle(replace(request, output=tmp_path / "b", ladder=False)).to_json()
    assert without["tasks"]["choices"]["k_ladder"] is None
    assert load_manifest(tmp_path / "b").tasks["choices"].k_ladder is None


@pytest.mark.slow
@pytest.mark.fused
def test_margins_of_texts_are_those_of_transformers(checkpoint: Path, tmp_path: Path) -> None:
    lines = tmp_path / "texts.jsonl"
    texts = [" ".join(f"w{3 + (n * m) % 90}" for m in range(1, 30)) for n in range(1, 41)]
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    request = ExportRequest(
        model=checkpoint,
        output=tmp_path / "bundle",
        target="jetson-orin",
        precision="fp32",
        tasks={"texts": lines},
        keep=1.0,
        max_drop=100.0,
        accept_large_drop=True,
        accept_weak_evidence=True,
    )
    export_bundle(request)
    ladder = load_manifest(tmp_path / "bundle").tasks["texts"].k_ladder
    assert ladder is not None
    assert [each.name for each in ladder] == ["full", "k3", "k2", "k1"]
    _, held_out = split_task(TaskFile.load("texts", lines))
    model = load_model(checkpoint)
    tokenizer = load_tokenizer(checkpoint)
    found = {}
    for each in ladder:
        chosen, margins = [], []
        for record in held_out.records:
            ids = torch.tensor([tokenizer.encode(record.calibration_text).ids])
            with limit_k(model, each.k_cap), torch.inference_mode():
                rows = model.model(input_ids=ids).logits[0, :-1].double()
            top = rows.log_softmax(-1).topk(2)
            chosen.append(top.indices[:, 0].numpy())
            margins.append(float((top.values[:, 0] - top.values[:, 1]).mean()))
        found[each.name] = Answers(tuple(chosen), np.array(margins))
        if each is ladder[0]:
            continue
        assert each.quality is not None
        margin = find_margin(found["full"], found[each.name])
        assert each.quality.margin == pytest.approx(margin, abs=1e-4)
        again = np.mean(found[each.name].margins <= margin)
        assert each.quality.asked_again == pytest.approx(again, abs=0.11)
