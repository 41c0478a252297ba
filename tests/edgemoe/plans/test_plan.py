from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgemoe.errors import OutputError, PlanError
from edgemoe.models import LayerShape, ModelShape
from edgemoe.prune import LayerPlan, MergedExpert, Plan

if TYPE_CHECKING:
    from pathlib import Path

EXPERTS = 8


def single(*ids: int) -> tuple[MergedExpert, ...]:
    return tuple(MergedExpert(members=(expert,)) for expert in ids)


def make_shape(top_k: int = 2, **changes: Any) -> ModelShape:
    layers = tuple(
        LayerShape(layer=index, num_experts=EXPERTS, top_k=top_k, **changes) for index in (1, 3)
    )
    return ModelShape(family="glm4_moe", layers=layers, hidden_size=4, intermediate_size=2)


def make_plan(*layers: tuple[MergedExpert, ...], **changes: Any) -> Plan:
    entries = (LayerPlan(layer=1 + 2 * i, experts=experts) for i, experts in enumerate(layers))
    return Plan(method="frequency", layers=tuple(entries), **changes)


@st.composite
def merged_experts(draw: st.DrawFn) -> tuple[MergedExpert, ...]:
    """A random partition of some of the experts, with random shares."""
    groups: dict[int, list[int]] = {}
    for expert in draw(st.sets(st.integers(0, EXPERTS - 1), min_size=1)):
        groups.setdefault(draw(st.integers(0, 4)), []).append(expert)
    share = st.floats(0.001, 10, allow_nan=False)
    return tuple(
        MergedExpert(
            members=tuple(draw(st.permutations(members))),
            weights=draw(
                st.none()
                | st.lists(share, min_size=len(members), max_size=len(members)).map(tuple)
            ),
            reference=draw(st.none() | st.sampled_from(members)),
        )
        for members in groups.values()
    )


options = st.dictionaries(
    st.text(max_size=5), st.integers() | st.text() | st.booleans(), max_size=3
)


@given(
    layers=st.lists(merged_experts(), min_size=1, max_size=3),
    options=options,
    seed=st.integers(0, 2**63),
    task=st.none() | st.text(),
)
def test_a_plan_survives_its_file_byte_for_byte(
    layers: list[tuple[MergedExpert, ...]], options: dict[str, Any], seed: int, task: str | None
) -> None:
    plan = make_plan(*layers, options=options, seed=seed, task=task)

    text = plan.to_json()

    assert Plan.from_json(text) == plan
    assert Plan.from_json(text).to_json() == text
    # Written and ordered by any other hand, it is the same plan.
    content = json.loads(text)
    content["layers"].reverse()
    for layer in content["layers"]:
        layer["experts"].reverse()
    other = json.dumps(dict(reversed(content.items())), indent=7)
    assert Plan.from_json(other).sha256 == plan.sha256


def test_a_plan_is_made_to_be_read() -> None:
    merged = MergedExpert(members=(9, 5), weights=(0.25, 0.75), reference=5)

    text = make_plan((*single(3), merged), task="bible", options={"b": 1, "a": 2}).to_json()

    assert text == (
        "{\n"
        '  "format": "edgemoe.plan",\n'
        '  "version": 1,\n'
        '  "method": "frequency",\n'
        '  "options": {"a": 2, "b": 1},\n'
        '  "seed": 0,\n'
        '  "task": "bible",\n'
        '  "checkpoint_sha256": null,\n'
        '  "statistics_sha256": null,\n'
        '  "edgemoe_version": null,\n'
        '  "layers": [\n'
        '    {"layer": 1, "experts": [\n'
        '      {"members": [3]},\n'
        '      {"members": [5, 9], "weights": [0.75, 0.25], "reference": 5}\n'
        "    ]}\n"
        "  ]\n"
        "}\n"
    )


def test_shares_add_up_and_the_heaviest_is_the_reference() -> None:
    expert = MergedExpert(members=(4, 2, 7), weights=(3, 1, 1))

    assert expert.members == (2, 4, 7)
    assert expert.shares == (0.2, 0.6, 0.2)
    assert expert.aligned_to == 4
    assert MergedExpert(members=(4, 2)).shares == (0.5, 0.5)


def test_fewer_experts_than_top_k_are_refused_with_layer_count_k_and_remedy() -> None:
    plan = make_plan(single(0, 1, 2), single(0, 1))

    with pytest.raises(
        PlanError, match=r"layer 3 must keep at least top_k=3 experts, got 2\. Keep 3 or more"
    ):
        plan.validate(make_shape(top_k=3))


def test_what_a_router_cannot_run_with_is_refused() -> None:
    with pytest.raises(PlanError, match="layer 1 must keep at least 2 experts, because"):
        make_plan(single(0), single(0)).validate(make_shape(top_k=1, min_group_size=2))


def test_experts_layers_and_checkpoints_that_do_not_exist_are_refused() -> None:
    shape = make_shape()
    with pytest.raises(PlanError, match=r"layer 3: expert ids must be in \[0, 8\), got 8"):
        make_plan(single(0, 1), single(1, 8)).validate(shape)
    with pytest.raises(PlanError, match=r"got layers \[3\] missing and layers \[\]"):
        make_plan(single(0, 1)).validate(shape)
    with pytest.raises(PlanError, match=r"got layers \[\] missing and layers \[5\]"):
        make_plan(single(0, 1), single(0, 1), single(0, 1)).validate(shape)
    plan = make_plan(single(0, 1), single(0, 1), checkpoint_sha256="aa")
    plan.validate(shape, "aa")
    with pytest.raises(PlanError, match="made for this checkpoint, got checkpoint_sha256 aa"):
        plan.validate(shape, "bb")


def test_router_groups_stay_equal_and_apart() -> None:
    shape = make_shape(n_group=4, min_group_size=1)
    make_plan(single(0, 2, 4, 6), single(1, 3, 5, 7)).validate(shape)
    with pytest.raises(PlanError, match=r"must keep as many experts, got \[2, 1, 1, 0\]"):
        make_plan(single(0, 1, 2, 4), single(0, 2, 4, 6)).validate(shape)
    across = (MergedExpert(members=(0, 2)), *single(3, 4, 6))
    with pytest.raises(PlanError, match="must be of one router group of 2"):
        make_plan(across, single(0, 2, 4, 6)).validate(shape)


def edited(path: tuple[Any, ...], value: Any) -> str:
    merged = MergedExpert(members=(1, 2), weights=(0.5, 0.5), reference=1)
    content = json.loads(make_plan((*single(0), merged), single(0, 1)).to_json())
    place = content
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return json.dumps(content)


FIRST = ("layers", 0, "experts", 0)
MERGED = ("layers", 0, "experts", 1)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("format",), "edgemoe.bundle", "format must be 'edgemoe.plan'"),
        (("version",), 2, "version must be 1"),
        (("version",), True, "version must be 1"),
        (("comment",), "mine", "known keys only, got ['comment']"),
        (("method",), 3, "method must be a string"),
        (("options",), [], "options must be an object"),
        (("seed",), -1, "seed must be an integer in [0, inf)"),
        (("seed",), True, "seed must be an integer in [0, inf)"),
        (("task",), 1, "task must be a string"),
        (("layers",), [], "layers must be one or more"),
        (("layers",), {}, "layers must be a list of objects"),
        (("layers", 1, "layer"), 1, "each once, got [1, 1]"),
        (("layers", 0, "layer"), 1.0, "layers[0]: layer must be an integer"),
        (("layers", 0, "width"), 3, "layers[0] must have known keys only"),
        ((*FIRST, "members"), [], "members must be one or more"),
        ((*FIRST, "members"), [-1], "members must be a list of integers in [0, inf)"),
        ((*FIRST, "members"), [1.5], "members must be a list of integers"),
        ((*FIRST, "members"), 3, "members must be a list of integers"),
        ((*FIRST, "members"), [1], "got expert 1 twice"),
        ((*FIRST, "member"), [0], "experts[0] must have known keys only"),
        ((*MERGED, "members"), [1, 1], "members must be different experts"),
        ((*MERGED, "weights"), [1.0], "weights must have one value for each"),
        ((*MERGED, "weights"), [0, 0], "with a positive sum"),
        ((*MERGED, "weights"), [2, -1], "weights must be finite, in [0, inf)"),
        ((*MERGED, "weights"), ["a", 1], "weights must be a list of numbers"),
        ((*MERGED, "reference"), 7, "reference must be one of the members [1, 2], got 7"),
    ],
)
def test_every_broken_entry_is_refused_where_it_is(
    path: tuple[Any, ...], value: Any, message: str
) -> None:
    with pytest.raises(PlanError) as caught:
        Plan.from_json(edited(path, value), "bible.json")

    assert message in str(caught.value)
    assert str(caught.value).startswith("bible.json")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '"plan"',
        '{"seed": NaN}',
        '{"seed": 1, "seed": 2}',
        '{"task": "\\ud800"}',
        '{"options": {"a": 1e999}}',
        "[" * 100_000,
    ],
)
def test_what_is_no_json_object_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="a plan must be"):
        Plan.from_json(text)


@pytest.mark.parametrize("key", ["format", "version", "method", "options", "seed", "layers"])
def test_absent_keys_are_named(key: str) -> None:
    content = json.loads(make_plan(single(0)).to_json())
    del content[key]

    with pytest.raises(PlanError, match=f"must have the key '{key}'"):
        Plan.from_json(json.dumps(content))


def test_files_are_read_and_written_whole(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    plan = make_plan(single(0, 1), task="märchen")

    plan.save(file)

    assert Plan.load(file) == plan
    with pytest.raises(OutputError, match="must not exist"):
        plan.save(file)
    plan.save(file, force=True)
    assert [found.name for found in tmp_path.iterdir()] == ["plan.json"]
    with pytest.raises(PlanError, match="does not exist"):
        Plan.load(tmp_path / "absent.json")
    with pytest.raises(PlanError, match="got a directory"):
        Plan.load(tmp_path)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(PlanError, match="UTF-8"):
        Plan.load(file)
