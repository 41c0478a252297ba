"""End tokens come from all three places where checkpoints keep them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from edgemoe.models.checkpoint import Checkpoint
from edgemoe.models.tiny import write_tiny_checkpoint
from edgemoe_exporters.bundle.end_tokens import find_end_tokens

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint("qwen3_moe", tmp_path_factory.mktemp("ends") / "moe")


@pytest.mark.parametrize(
    ("config", "generation", "settings", "ends"),
    [
        (3, None, {}, (3,)),
        (3, {"eos_token_id": [4, 5]}, {}, (4, 5, 3)),
        (None, None, {"tokenizer_config.json": {"eos_token": "w7"}}, (7,)),
        ([3, 4], {"eos_token_id": 4},
         {"tokenizer_config.json": {"eos_token": {"content": "w7"}}}, (4, 3, 7)),
        (None, {}, {"special_tokens_map.json": {"eos_token": "w9"}}, (9,)),
        (None, None, {"tokenizer_config.json": {"eos_token": "nowhere"}}, ()),
        ([3, 10**6, -1], None, {}, (3,)),
    ],
)  # fmt: skip
def test_all_three_places_are_heeded(
    model: Path, config: Any, generation: Any, settings: dict[str, Any], ends: tuple[int, ...]
) -> None:
    content = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**content, "eos_token_id": config}))
    for name in ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json"):
        (model / name).unlink(missing_ok=True)
    if generation is not None:
        (model / "generation_config.json").write_text(json.dumps(generation))
    for name, given in settings.items():
        (model / name).write_text(json.dumps(given))
    checkpoint = Checkpoint(model)

    assert find_end_tokens(checkpoint, checkpoint.tokenizer) == ends
