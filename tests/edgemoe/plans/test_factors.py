"""Plans with ranks: the file, the tokens in it, and plans without, which stay as they were."""

from __future__ import annotations

import base64
import json
import zlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgemoe.calibrate.sample import Window
from edgemoe.errors import PlanError
from edgemoe.models import LayerShape, ModelShape
from edgemoe.plans.factors import EmbeddedSample, Factors
from edgemoe.plans.plan import LayerPlan, MergedExpert, Plan

PAIR = (MergedExpert(members=(0,)), MergedExpert(members=(2, 3)))
windows = st.lists(
    st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=20), min_size=1, max_size=5
)


def embed(rows: list[list[int]]) -> EmbeddedSample:
    return EmbeddedSample.of([Window(line=9, start=4, ids=row, digest=1) for row in rows])


def make_plan(
    ranks: tuple[tuple[int, int], ...] | None = ((4, 3), (4, 3)), **changes: Any
) -> Plan:
    factors = None if ranks is None else Factors(method="svd", options={"b": 1, "a": "x"})
    layers = (
        LayerPlan(layer=1, experts=PAIR, ranks=ranks),
        LayerPlan(layer=3, experts=PAIR[:1]),
    )
    entries: dict[str, Any] = {"method": "reap", "layers": layers, "factors": factors}
    return Plan(**entries | changes)


@given(rows=windows)
def test_tokens_survive_the_file(rows: list[list[int]]) -> None:
    sample = embed(rows)
    plan = make_plan(factors=Factors(method="svd-whitened", sample=sample))

    again = Plan.from_json(plan.to_json())

    assert again == plan
    assert again.to_json() == plan.to_json()
    assert again.factors is not None
    assert again.factors.sample is not None
    assert [window.ids for window in again.factors.sample.to_windows()] == rows
    assert again.factors.sample.sha256 == sample.sha256


def test_the_digest_is_of_tokens_and_windows_whatever_compressed_them() -> None:
    sample = embed([[1, 2], [3]])
    stored = zlib.compress(np.array([1, 2, 3], "<i4").tobytes(), 0)

    other = replace(sample, ids=base64.b64encode(stored).decode())

    assert other.ids != sample.ids
    assert other.sha256 == sample.sha256
    assert embed([[1], [2, 3]]).sha256 != sample.sha256
    assert embed([[1, 2], [4]]).sha256 != sample.sha256
    # And a plan keeps the text that it was given.
    plan = make_plan(factors=Factors(method="m", sample=other))
    assert Plan.from_json(plan.to_json()).to_json() == plan.to_json()


def test_a_plan_with_ranks_is_made_to_be_read() -> None:
    text = make_plan().to_json()

    assert text.splitlines()[10:] == [
        '  "factors": {"edgemoe_version": null, "method": "svd", "options": {"a": "x", '
        '"b": 1}, "sample": null, "statistics_sha256": null, "task": null},',
        '  "layers": [',
        '    {"layer": 1, "ranks": [4, 3], "experts": [',
        '      {"members": [0]},',
        '      {"members": [2, 3]}',
        "    ]},",
        '    {"layer": 3, "experts": [',
        '      {"members": [0]}',
        "    ]}",
        "  ]",
        "}",
    ]
    assert '"ranks": [[4, 3], [2, 5]]' in make_plan(((4, 3), (2, 5))).to_json()


def test_a_plan_without_ranks_has_the_bytes_that_it_always_had() -> None:
    plan = make_plan(None, task="bible", seed=3, options={"keep_experts": [2, 1]})

    assert "ranks" not in plan.to_json()
    assert "factors" not in plan.to_json()
    # As written before plans had ranks.
    assert plan.sha256 == "2cb98e04be63277e13ecf13d21d1b5f351499c11c5a7010093049be362971c61"


def test_ranks_follow_their_experts() -> None:
    one, other = PAIR
    layer = LayerPlan(layer=1, experts=(other, one), ranks=((9, 1), (4, 3)))

    assert layer.experts == PAIR
    assert layer.ranks == ((4, 3), (9, 1))
    assert layer.stored_ranks == (9, 3)
    content = json.loads(make_plan(((4, 3), (9, 1))).to_json())
    content["layers"][0]["experts"].reverse()
    content["layers"][0]["ranks"].reverse()
    assert Plan.from_json(json.dumps(content)) == make_plan(((4, 3), (9, 1)))


def test_ranks_above_the_experts_widths_are_refused() -> None:
    shape = ModelShape(
        family="mixtral",
        layers=tuple(LayerShape(layer=index, num_experts=4, top_k=1) for index in (1, 3)),
        hidden_size=10,
        intermediate_size=4,
    )
    make_plan(((8, 4), (1, 1))).validate(shape)
    with pytest.raises(PlanError, match=r"layer 1: up ranks must be in \[1, 8\], got 9"):
        make_plan(((9, 4), (1, 1))).validate(shape)
    with pytest.raises(PlanError, match=r"layer 1: down ranks must be in \[1, 4\], got 5"):
        make_plan(((8, 4), (1, 5))).validate(shape)


def test_shared_bases_have_one_rank_that_kernels_take() -> None:
    shape = ModelShape(
        family="mixtral",
        layers=tuple(LayerShape(layer=index, num_experts=4, top_k=1) for index in (1, 3)),
        hidden_size=24,
        intermediate_size=4,
    )
    factors = Factors(method="shared-basis")
    make_plan(((16, 16), (16, 16)), factors=factors).validate(shape)
    for ranks, message in (
        (
            ((16, 8), (16, 8)),
            r"layer 1: experts that share bases must have one rank, got \[8, 16",
        ),
        (((12, 12), (12, 12)), "layer 1: the rank of shared bases must be a multiple of 8"),
        (((32, 32), (32, 32)), r"layer 1: up ranks must be in \[1, 24\], got 32"),
    ):
        with pytest.raises(PlanError, match=message):
            make_plan(ranks, factors=factors).validate(shape)


def test_factors_and_ranks_go_together() -> None:
    with pytest.raises(PlanError, match="both factors and ranks, or none of them, got no"):
        make_plan(factors=None)
    with pytest.raises(PlanError, match=r"got factors and ranks of layers \[\]"):
        make_plan(None, factors=Factors(method="svd"))


BOMB = base64.b64encode(zlib.compress(bytes(100_000_000), 9)).decode()
SAMPLE = ("factors", "sample")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("layers", 0, "ranks"), [4], "layers[0]: ranks must be a pair of integers"),
        (("layers", 0, "ranks"), [4, 3.0], "ranks must be a pair of integers"),
        (("layers", 0, "ranks"), [[4, 3], 4], "or a list of pairs"),
        (("layers", 0, "ranks"), [4, 0], "ranks must be integers in [1, inf), got 0"),
        (("layers", 0, "ranks"), [[4, 3]], "a pair for each of the 2 experts, got 1"),
        (("layers", 1, "rank"), [4, 3], "layers[1] must have known keys only"),
        (("factors",), [], "factors must be an object"),
        (("factors", "method"), None, "factors: method must be a string"),
        (("factors", "options"), 3, "factors: options must be an object"),
        (("factors", "seed"), 3, "factors must have known keys only, got ['seed']"),
        ((*SAMPLE, "digest"), 3, "sample must have known keys only"),
        ((*SAMPLE, "windows"), [], "windows must be one or more numbers"),
        ((*SAMPLE, "windows"), [2, 0, 1], "windows must be one or more numbers"),
        ((*SAMPLE, "windows"), [2, 2], "hold the 4 tokens of the windows, got 3"),
        ((*SAMPLE, "windows"), [2], "hold the 2 tokens of the windows, got more"),
        ((*SAMPLE, "ids"), BOMB, "hold the 3 tokens of the windows, got more"),
        ((*SAMPLE, "ids"), "eJx=", "hold the 3 tokens of the windows, got 0"),
        ((*SAMPLE, "ids"), "eJ$x", "ids must be zlib data in base64"),
        ((*SAMPLE, "ids"), "é", "ids must be zlib data in base64"),
        ((*SAMPLE, "ids"), "AAAA", "ids must be zlib data in base64"),
        ((*SAMPLE, "ids"), embed([[7]]).ids, "hold the 3 tokens of the windows, got 1"),
    ],
)
def test_every_broken_entry_is_refused_where_it_is(
    path: tuple[Any, ...], value: Any, message: str
) -> None:
    sample = embed([[1, 2], [3]])
    content = json.loads(make_plan(factors=Factors(method="svd", sample=sample)).to_json())
    place = content
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value

    with pytest.raises(PlanError) as caught:
        Plan.from_json(json.dumps(content), "plan.json")

    assert message in str(caught.value)
    assert str(caught.value).startswith("plan.json")


def test_negative_ids_are_refused() -> None:
    stored = base64.b64encode(zlib.compress(np.array([1, -2], "<i4").tobytes())).decode()
    with pytest.raises(PlanError, match=r"token ids in \[0, inf\)"):
        EmbeddedSample(windows=(2,), ids=stored)


def test_a_description_has_no_tokens() -> None:
    sample = embed([[1, 2], [3]])

    found = Factors(method="svd-whitened", task="t", sample=sample).describe()

    assert found["sample_tokens"] == 3
    assert found["sample_sha256"] == sample.sha256
    assert sample.ids not in json.dumps(found)
    assert Factors(method="svd").describe()["sample_sha256"] is None
