"""A written config.json has the spellings of its source, with the values that hold now."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from edgemoe.models import load_model, save_model
from edgemoe.models.checkpoint import Checkpoint
from edgemoe.models.registry import FAMILIES
from edgemoe.models.saving import save_settings
from edgemoe.models.tiny import write_tiny_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

_FAST = {"gpt_oss", "nemotron_h"}
_OF_THE_FILES = {"architectures", "dtype", "model_type", "torch_dtype", "transformers_version"}


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "config.json").read_bytes())
    return found


def test_a_pruned_checkpoint_is_described_as_its_family_is_published(tmp_path: Path) -> None:
    path = write_tiny_checkpoint("qwen3_moe", tmp_path / "moe")
    # As checkpoints on the hub spell it, and with an entry that transformers does not know.
    content = read(path)
    rope = content.pop("rope_parameters")
    content["num_experts"] = content.pop("num_local_experts")
    content["torch_dtype"] = content.pop("dtype")
    content |= {"rope_theta": rope["rope_theta"], "rope_scaling": None, "own": [1, {"a": 2}]}
    content["quantization_config"] = None
    # A spelling of other programs, which transformers does not know for this family.
    content |= {"n_routed_experts": 8, "moe_num_experts": [8, 8], "n_experts": 3}
    (path / "config.json").write_text(json.dumps(content))
    model = load_model(path)
    for layer in model.layers:
        layer.keep(range(4))
    (tmp_path / "pruned").mkdir()
    save_model(model, tmp_path / "pruned")

    written = read(tmp_path / "pruned")
    assert written["num_experts"] == written["num_local_experts"] == 4
    # The last counts something else.
    others = [written[name] for name in ("n_routed_experts", "moe_num_experts", "n_experts")]
    assert others == [4, [4, 4], 3]
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 10000.0
    assert written["torch_dtype"] == written["dtype"] == "float32"
    assert (written["rope_scaling"], written["own"]) == (None, [1, {"a": 2}])
    assert "quantization_config" not in written
    # What was written is read as before, and written again as it is.
    again = load_model(tmp_path / "pruned")
    assert again.config.rope_parameters["rope_theta"] == 10000.0
    (tmp_path / "again").mkdir()
    save_model(again, tmp_path / "again")
    assert read(tmp_path / "again") == written


@pytest.mark.parametrize(
    "family",
    [f if f in _FAST else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES],
)
def test_no_entry_of_a_source_is_lost(tmp_path: Path, family: str) -> None:
    path = write_tiny_checkpoint(family, tmp_path / "moe")
    predicting = {"num_nextn_predict_layers": 1, "mtp_num_hidden_layers": 1, "use_mtp": True}
    before = read(path) | {"own": "kept"} | predicting
    (path / "config.json").write_text(json.dumps(before))
    checkpoint = Checkpoint(path)
    model = checkpoint.structure
    model.config_entries = checkpoint.configuration.entries
    (tmp_path / "out").mkdir()
    save_settings(model, tmp_path / "out", model.experts_per_layer, source=path, provenance={})
    after = read(tmp_path / "out")
    assert {name for name in before if name not in after} == set()
    differing = {
        name: (value, after[name])
        for name, value in before.items()
        if name not in _OF_THE_FILES and after[name] != value
    }
    # Layers that predict further tokens are not written, and no default says that they are.
    counted = {name: differing.pop(name) for name in predicting}
    differing = {name: pair for name, pair in differing.items() if "mtp" not in name}
    assert differing == {}
    assert [(after[name], type(after[name])) for name in counted] == [
        (0, int), (0, int), (False, bool),
    ]  # fmt: skip
    again = Checkpoint(tmp_path / "out").config
    assert not getattr(again, "num_mtp_layers", None)
    assert not getattr(again, "num_nextn_predict_layers", None)
