"""Keys of engines: what becomes a part of a file's name can be nothing else."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from edgemoe_runtime.bundle.engine_cache import EngineKey
from edgemoe_runtime.errors import ManifestError

if TYPE_CHECKING:
    from pathlib import Path

KEY = EngineKey(
    task="code",
    graph_sha256="0" * 64,
    precision="fp16",
    package="tensorrt",
    package_version="10.3.0.30+cuda12",
    compute_capability=87,
    shapes={"input_ids": ((1, 1), (1, 8), (1, 64))},
    engine_sha256="1" * 64,
    engine_size=10,
)


@pytest.mark.parametrize("name", ["task", "precision", "package_version"])
@pytest.mark.parametrize("value", ["a/b", "../a", "", "a\nb", "a" * 65, 3])
def test_a_part_of_a_files_name_is_one(tmp_path: Path, name: str, value: object) -> None:
    path = tmp_path / "key.json"
    path.write_text(KEY.dumps())
    assert EngineKey.load(path) == KEY
    path.write_text(json.dumps({**KEY.to_json(), name: value}))

    with pytest.raises(ManifestError, match=rf"key\.json\.{name} must be"):
        EngineKey.load(path)
