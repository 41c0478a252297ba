"""The order of experts that lets tasks share one stack of weights."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgemoe.errors import ExportError
from edgemoe_exporters.bundle.expert_layout import StackLayout, lay_out

experts = st.lists(st.integers(0, 15), min_size=1, max_size=16, unique=True)


def count_duplicates(layout: StackLayout) -> int:
    """Slots that hold an expert which another slot holds too."""
    return len(layout.slots) - len(set(layout.slots))


@given(st.dictionaries(st.sampled_from("abcde"), experts, min_size=1))
@settings(max_examples=150, deadline=None)
def test_every_task_reads_exactly_its_experts(selections: dict[str, list[int]]) -> None:
    layout = lay_out(selections)
    for task, wanted in selections.items():
        got = layout.experts_of(task)
        assert len(got) == len(wanted)
        assert set(got) == set(wanted)
    assert set(layout.slots) == set(itertools.chain(*selections.values()))
    assert len(layout.slots) <= sum(map(len, selections.values()))
    assert lay_out(selections) == layout


@given(experts, experts)
def test_two_tasks_store_the_union(first: list[int], second: list[int]) -> None:
    layout = lay_out({"first": first, "second": second})
    assert len(layout.slots) == len(set(first) | set(second))
    assert count_duplicates(layout) == 0
    assert layout.shared == bool(set(first) & set(second))


def test_two_tasks_are_first_only_common_second_only() -> None:
    layout = lay_out({"a": [0, 1, 2, 3], "b": [2, 3, 4]})
    assert set(layout.slots[:2]) == {0, 1}
    assert set(layout.slots[2:4]) == {2, 3}
    assert layout.slots[4:] == (4,)


@given(
    st.permutations(range(12)),
    st.lists(st.tuples(st.integers(0, 11), st.integers(1, 12)), min_size=3, max_size=5),
)
@settings(max_examples=100, deadline=None)
def test_selections_with_consecutive_ones_are_stored_once(
    row: list[int], cuts: list[tuple[int, int]]
) -> None:
    windows = {str(i): row[start : start + count] for i, (start, count) in enumerate(cuts)}
    assert count_duplicates(lay_out(windows)) == 0


def _shortest(sets: list[frozenset[int]]) -> int:
    """Length of the optimum, by trying every row."""
    alphabet = sorted(frozenset.union(*sets))
    for length in itertools.count(len(alphabet)):
        for row in itertools.product(alphabet, repeat=length):
            if all(
                any(frozenset(row[i : i + len(s)]) == s for i in range(length - len(s) + 1))
                for s in sets
            ):
                return length
    raise AssertionError


@given(st.lists(st.frozensets(st.integers(0, 3), min_size=1), min_size=3, max_size=3))
@settings(max_examples=60, deadline=None)
def test_three_small_tasks_reach_the_optimum(sets: list[frozenset[int]]) -> None:
    layout = lay_out({str(i): sorted(s) for i, s in enumerate(sets)})
    assert len(layout.slots) == _shortest(sets)


def test_many_tasks_use_the_heuristic() -> None:
    selections = {str(i): [(i + j) % 16 for j in range(8)] for i in range(9)}
    layout = lay_out(selections)
    assert count_duplicates(layout) <= 2


@pytest.mark.parametrize("bad", [[], [1, 1]])
def test_refuses_empty_and_repeated_selections(bad: list[int]) -> None:
    with pytest.raises(ExportError, match="task t must be distinct"):
        lay_out({"t": bad})
