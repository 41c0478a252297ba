"""What messages repeat is short, and obeyed by no terminal; JSON is strict for all."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgemoe_runtime.input_files import parse_strict, read_file
from edgemoe_runtime.messages import clip, escape_controls, printable, quote

if TYPE_CHECKING:
    from pathlib import Path


@given(st.text(), st.integers(0, 3000))
def test_no_message_is_long_or_moves_a_cursor(text: str, times: int) -> None:
    message = printable(f"got {text * times!s} and {text!r}. Remedy.")

    assert len(message) <= 900 + 8 * sum(not c.isprintable() for c in text) * 0 + 900
    assert not {c for c in message if ord(c) < 32 or ord(c) == 127} - {"\n", "\t"}
    assert len(quote(text * times)) <= 200


def test_the_remedy_stays() -> None:
    message = printable(f"a file must be whole, got {'x y ' * 5000}. Copy it again.")
    assert message.startswith("a file must be whole, got x y")
    assert message.endswith("Copy it again.")
    assert "x" * 10 + "..." in printable(f"got {'x' * 500}.")
    assert printable("short: \x1b[31m\u202e") == "short: \\x1b[31m\\u202e"
    assert clip("abcdefghij", 7) == "abc...j"
    assert escape_controls("täglich\n") == "täglich\n"


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "got 'c' twice"),
        ("[NaN]", "got NaN"),
        ("Infinity", "got Infinity"),
        ("[" * 100_000, "nested too deeply"),
        ("{", "Expecting property name"),
        (b'"\xff"', "utf-8"),
    ],
)
def test_json_that_two_readers_could_read_differently_is_refused(text: Any, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        parse_strict(text)


def test_published_configurations_may_have_open_limits() -> None:
    """transformers before 5 wrote them so; NaN stands for nothing."""
    assert parse_strict('{"time_step_limit": [0.0, Infinity]}', infinities=True) == {
        "time_step_limit": [0.0, float("inf")]
    }
    with pytest.raises(ValueError, match="NaN"):
        parse_strict('{"x": NaN}', infinities=True)


def test_only_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="named pipe"):
        read_file(tmp_path / "pipe")
    with pytest.raises(IsADirectoryError):
        read_file(tmp_path)
    (tmp_path / "file").write_bytes(b"12345")
    assert read_file(tmp_path / "file", 5) == b"12345"
    with pytest.raises(OSError, match="at most 4 bytes"):
        read_file(tmp_path / "file", 4)
