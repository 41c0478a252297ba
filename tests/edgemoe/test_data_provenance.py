from __future__ import annotations

import base64
import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgemoe.data_provenance import digest_line, read_digests, write_digests
from edgemoe.tasks import ChoiceRecord, CompletionRecord, TextRecord


@given(st.frozensets(st.integers(-(2**63), 2**63 - 1)))
def test_digests_survive_and_equal_sets_are_equal_text(digests: frozenset[int]) -> None:
    text = write_digests(digests)
    assert read_digests(text) == digests
    assert write_digests(list(digests) * 2) == text


def test_a_line_is_what_calibration_reads_of_it() -> None:
    text = TextRecord(line=1, text="bearing hot")
    same = CompletionRecord(line=9, prompt="bearing", completion=" hot")
    choice = ChoiceRecord(line=2, prompt="bearing", choices=(" cold", " hot"), answer=1)
    expected = hashlib.sha256(b"bearing hot").digest()[:8]
    for record in (text, same, choice):
        assert digest_line(record).to_bytes(8, "big", signed=True) == expected
    assert digest_line(TextRecord(line=1, text="bearing cold")) != digest_line(text)


@pytest.mark.parametrize("text", ["?", "AAAA", base64.b64encode(b"123456789").decode()])
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="digests of lines must"):
        read_digests(text)
