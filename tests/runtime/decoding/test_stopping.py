"""Stop strings, however the text is cut into pieces."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from edgemoe_runtime.decoding.stopping import StopFilter, TokenStops

TEXT = st.text("abc", max_size=40)


def reference(text: str, stop: list[str]) -> tuple[str, bool]:
    """Cut before the stop string that is complete first, the longest of equals."""
    for end in range(1, len(text) + 1):
        complete = [string for string in stop if text[:end].endswith(string)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


@given(
    TEXT,
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, 40), max_size=8),
)
def test_stops_before_the_string(text: str, stop: list[str], cuts: list[int]) -> None:
    expected, stopped = reference(text, stop)
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(places)]
    filter_ = StopFilter(stop)
    shown = ""
    for piece in pieces:
        shown += filter_.push(piece)
        # nothing that is shown is ever taken back
        assert expected.startswith(shown)
    if not filter_.stopped:
        shown += filter_.flush()
    assert (shown, filter_.stopped) == (expected, stopped)


def test_text_that_cannot_be_a_stop_string_is_shown_at_once() -> None:
    filter_ = StopFilter(["\n\n"])
    assert filter_.push("hello\n") == "hello"
    assert filter_.push("world") == "\nworld"
    assert filter_.push("\n\nmore") == ""
    assert filter_.push("anything") == ""


TOKENS = st.lists(st.integers(0, 2), max_size=30)


@given(TOKENS, st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=3), max_size=3))
def test_stops_before_the_tokens(tokens: list[int], sequences: list[list[int]]) -> None:
    """The sequence that is complete first ends the text; of equals the longest is taken off."""
    expected, stopped = tokens, False
    for end in range(1, len(tokens) + 1):
        complete = [s for s in sequences if tokens[:end][-len(s) :] == s]
        if complete:
            expected, stopped = tokens[: end - max(map(len, complete))], True
            break
    filter_ = TokenStops(sequences)
    shown: list[int] = []
    for token in tokens:
        shown += filter_.push(token)
        assert expected[: len(shown)] == shown
        if filter_.stopped:
            break
    shown += filter_.flush()

    assert (shown, filter_.stopped) == (expected, stopped)
