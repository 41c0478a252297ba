"""Files beside config.json that say how weights are stored."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import pytest

from edgemoe.cli.describe.checkpoint import describe_checkpoint
from edgemoe.errors import CheckpointError
from edgemoe.models import load_model
from edgemoe.models.opening import open_streamed
from edgemoe.models.tiny import write_tiny_checkpoint
from edgemoe.models.weights.fingerprint import fingerprint_checkpoint
from tests.edgemoe.models.quantised.storing import write_both
from tests.edgemoe.models.quantised.test_packed_columns import GROUP, fits, store

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("content", "got"),
    [
        ('{"bits": 4, "bits": 8}', "bits"),
        ('{"bits": NaN}', "NaN"),
        ('{"bits": 4', "Expecting"),
        ("[4]", "list"),
    ],
)
def test_a_file_that_may_announce_is_read_strictly(
    tmp_path: Path, content: str, got: str
) -> None:
    """Of what is not understood nobody knows whether the weights are plain."""
    plain = write_tiny_checkpoint("mixtral", tmp_path / "plain")
    (plain / "quantize_config.json").write_text(content)
    message = rf"quantize_config\.json must be .*{re.escape(got)}"
    for read in (load_model, open_streamed, describe_checkpoint):
        with pytest.raises(CheckpointError, match=message):
            read(plain)


def test_what_announces_the_form_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    told = {"bits": 4, "group_size": GROUP, "desc_act": False}
    beside = "quantize_config.json"
    quantised, _ = write_both("mixtral", tmp_path, store, told, beside=beside, chosen=fits)
    before = fingerprint_checkpoint(quantised)
    (quantised / beside).write_text(json.dumps({**told, "bits": 8}))
    assert fingerprint_checkpoint(quantised) != before
    (quantised / "generation_config.json").write_text("{}")
    (quantised / beside).write_text(json.dumps(told))
    assert fingerprint_checkpoint(quantised) == before
