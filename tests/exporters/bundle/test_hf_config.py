"""config.json of a bundle: unchanged where optimum understands it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from edgemoe_exporters.bundle.hf_config import adapt_config, write_config

if TYPE_CHECKING:
    from pathlib import Path

PLAIN = {"model_type": "mixtral", "hidden_size": 64, "num_attention_heads": 4}


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"num_key_value_heads": 4},
        {"head_dim": 16},
        {"head_dim": None},
        {"hidden_size": None},
    ],
)
def test_what_optimum_understands_is_copied(tmp_path: Path, extra: dict[str, object]) -> None:
    source = tmp_path / "config.json"
    source.write_text(json.dumps({**PLAIN, **extra}, indent=7))
    write_config(source.read_bytes(), tmp_path / "copy.json")
    assert (tmp_path / "copy.json").read_bytes() == source.read_bytes()


@pytest.mark.parametrize(
    ("extra", "heads", "size"),
    [({"num_key_value_heads": 2}, 2, 16), ({"head_dim": 8}, 4, 8)],
)
def test_a_cache_that_optimum_would_misread_is_spelt_out(
    extra: dict[str, int], heads: int, size: int
) -> None:
    adapted = adapt_config({**PLAIN, **extra, "edgemoe": {"provenance": {}}, "vocab_size": 9})
    assert adapted["model_type"] == "gpt_oss"
    assert (adapted["num_key_value_heads"], adapted["head_dim"]) == (heads, size)
    assert adapted["edgemoe"] == {"provenance": {}, "model_type": "mixtral"}
    assert adapted["vocab_size"] == 9
