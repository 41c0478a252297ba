"""What edgemoe writes, opened where there is no edgemoe."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch

from edgemoe.models import load_model, save_model
from edgemoe.models.tiny import write_tiny_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

OPEN = """
import sys
class Forbidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("edgemoe", "edgemoe_exporters", "edgemoe_runtime"):
            raise ImportError(name)
sys.meta_path.insert(0, Forbidden())
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    logits = model(torch.tensor([[5, 6, 7, 8]]), use_cache=False).logits
torch.save(logits, sys.argv[2])
"""


@pytest.mark.parametrize(
    "family",
    [
        "qwen3_moe",
        pytest.param("deepseek_v2", marks=pytest.mark.slow),
        pytest.param("gpt_oss", marks=pytest.mark.slow),
        pytest.param("granitemoe", marks=pytest.mark.slow),
    ],
)
def test_a_uniform_plan_gives_a_checkpoint_for_everyone(family: str, tmp_path: Path) -> None:
    model = load_model(write_tiny_checkpoint(family, tmp_path / "whole"))
    for layer in model.layers:
        layer.keep([0, 2, 3, 5, 7])
    path = tmp_path / "pruned"
    path.mkdir()
    save_model(model, path)

    subprocess.run(
        [sys.executable, "-c", OPEN, str(path), str(tmp_path / "logits")],
        check=True,
        capture_output=True,
    )

    with torch.no_grad():
        expected = model.model(torch.tensor([[5, 6, 7, 8]]), use_cache=False).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits"), expected)
    config = json.loads((path / "config.json").read_text())
    # Serving engines size layers by the same entries.
    assert [config[entry] for entry in model.count_entries] == [5]
    assert not (path / "edgemoe.json").exists()
