"""The manifest's format: what is written is read back equal, and nothing else is read."""

from __future__ import annotations

import copy
import json
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgemoe_runtime.bundle.cache_spec import CacheState
from edgemoe_runtime.bundle.graph_spec import TensorSpec
from edgemoe_runtime.bundle.manifest_file import load_manifest, parse_manifest, save_manifest
from edgemoe_runtime.bundle.manifest_rules import check_manifest
from edgemoe_runtime.bundle.task_entry import (
    DataInfo,
    ParityReport,
    QualityReport,
    WeightsInfo,
)
from edgemoe_runtime.errors import ManifestError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from edgemoe_runtime.bundle.manifest import Manifest

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture
def manifest(bundles: dict[str, Path]) -> Manifest:
    return load_manifest(bundles["concat"])


def test_round_trip_with_every_part(manifest: Manifest, tmp_path: Path) -> None:
    task = replace(
        manifest.tasks["model"],
        experts=((0, 1, (2, 7), 3, 4), (9, 8, 7, 6, 5)),
        plan={"method": "reap", "seed": 0},
        parity=ParityReport(max_abs_logit_difference=1e-6, tokens=64, reference="eager fp32"),
        quality=QualityReport(
            before={"value": 1.5},
            after={"value": 1.6},
            data=DataInfo(file="test.jsonl", sha256="a" * 64, lines=10),
            max_drop=0.1,
            passed=True,
            drop={"value": 0.07, "ci95": [0.02, 0.09], "lines": 10},
            same_token_share=0.93,
            kl_nats=0.02,
            positions=512,
            speed={"ms_per_token": 2.5},
        ),
        weights=WeightsInfo(
            checkpoint="moe", checkpoint_sha256="b" * 64, recovered_by=("lora", "router-kd")
        ),
    )
    full = replace(manifest, tasks={"model": task})
    save_manifest(full, tmp_path)
    assert load_manifest(tmp_path) == full
    # Bundles of the schema before have less, and are read.
    assert parse_manifest(manifest.to_json() | {"schema_version": 1}) == manifest
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_states_are_read_back_and_must_be_those_of_the_graph(manifest: Manifest) -> None:
    states = (
        CacheState(name="0.conv_state", dtype="float32", shape=(8, 3)),
        CacheState(name="0.indexer_key", dtype="float32", shape=(None, 4)),
    )
    cache = replace(
        manifest.kv_cache, layers=(None, manifest.kv_cache.layers[1]), states=states
    )
    shapes: dict[str, tuple[int | str, ...]] = {
        "0.conv_state": ("batch", 8, 3),
        "0.indexer_key": ("batch", "past", 4),
    }

    def specs(prefix: str, old: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
        kept = [spec for spec in old if not spec.name.startswith(f"{prefix}.0.")]
        kept += [
            TensorSpec(name=f"{prefix}.{name}", dtype="float32", shape=shape)
            for name, shape in shapes.items()
        ]
        return tuple(kept)

    inputs = specs("past_key_values", manifest.inputs)
    outputs = specs("present", manifest.outputs)
    changed = replace(manifest, kv_cache=cache, inputs=inputs, outputs=outputs)
    assert parse_manifest(changed.to_json()) == changed
    assert "states" not in manifest.to_json()["kv_cache"]  # type: ignore[operator]

    wider = replace(cache, states=(replace(states[0], shape=(8, 4)), states[1]))
    with pytest.raises(ManifestError, match=r"0\.conv_state must be as kv_cache says.*8, 4"):
        check_manifest(replace(changed, kv_cache=wider))
    with pytest.raises(ManifestError, match=r"differs.*0\.indexer_key"):
        check_manifest(replace(changed, kv_cache=replace(cache, states=states[:1])))


def test_a_newer_schema_is_refused_with_a_remedy(manifest: Manifest) -> None:
    document = manifest.to_json() | {"schema_version": 3, "created_by": "edgemoe 9.0"}
    rule = r"must be 1 or 2, got 3 written by edgemoe 9\.0\. Inst"
    with pytest.raises(ManifestError, match=rule):
        parse_manifest(document)


@pytest.mark.parametrize(
    ("flavour", "precision", "needed"),
    [("ort", "fp16", "1.28"), ("ort", "int4", "1.31"), ("tensorrt", "fp16", "1.23")],
)
def test_the_first_schema_is_read_as_needing_what_its_graphs_did(
    manifest: Manifest, flavour: str, precision: str, needed: str
) -> None:
    changed = replace(manifest, flavour=flavour, precision=precision)
    document = changed.to_json() | {"schema_version": 1}
    del document["needs_onnxruntime"]
    assert parse_manifest(document) == replace(changed, needs_onnxruntime=needed)
    with pytest.raises(ManifestError, match=r"must have the keys \['needs_onnxruntime'\]"):
        parse_manifest(document | {"schema_version": 2})


@pytest.mark.parametrize("release", ["1", "1.31.0", "latest", "1.x", "1.99999"])
def test_a_release_has_two_numbers(manifest: Manifest, release: str) -> None:
    with pytest.raises(ManifestError, match=r"must be a release such as 1\.31"):
        check_manifest(replace(manifest, needs_onnxruntime=release))


@pytest.mark.parametrize("kind", ["link", "pipe", "long"])
def test_only_a_plain_file_of_some_size_is_read(
    manifest: Manifest, tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "manifest.json"
    if kind == "link":
        (tmp_path / "elsewhere").mkdir()
        save_manifest(manifest, tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere" / "manifest.json")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        with path.open("wb") as file:
            file.truncate(1 << 31)
    with pytest.raises(ManifestError, match=r"regular file|at most"):
        load_manifest(tmp_path)


def test_a_missing_manifest_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="interrupted"):
        load_manifest(tmp_path)
    with pytest.raises(ManifestError):
        load_manifest(tmp_path / "absent")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '"text"',
        '{"format": "edgemoe.bundle", "format": "edgemoe.bundle"}',
        '{"format": "edgemoe.bundle", "schema_version": NaN}',
        '{"format": "edgemoe.bundle", "schema_version": true}',
        "[" * 100_000,
        "\ufeff{}",
    ],
)
def test_what_is_no_manifest_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ManifestError):
        load_manifest(tmp_path)


def change(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def apply(document: dict[str, Any]) -> None:
        *folders, last = path.split("/")
        place: Any = document
        for name in folders:
            place = place[int(name)] if isinstance(place, list) else place[name]
        place[int(last) if isinstance(place, list) else last] = value

    return apply


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("surprise", 1, "surprise"),
        ("model/surprise", 1, "surprise"),
        ("target", "toaster", "cpu, cuda"),
        ("flavour", "vanilla", "ort, tensorrt"),
        ("precision", "fp8", "fp32"),
        ("kv_cache/form", "paged", "shared_buffer"),
        ("kv_cache/layers/0/heads", 0, ">= 1"),
        ("kv_cache/layers/0/heads", True, ">= 1"),
        ("kv_cache/layers", [], "at least one entry per decoder layer"),
        ("tasks", {}, "at least one task"),
        ("tasks/model/graph", "other.onnx", "must be model.onnx"),
        ("tasks/model/top_k", 9, "at least top_k 9"),
        ("tasks/model/experts_per_layer", [5], "one count per MoE layer"),
        ("tasks/model/experts", [[1], [2]], "must match"),
        ("model/moe_layers", [1, 0], "ascend"),
        ("model/moe_layers", [0, 2], "below num_layers"),
        ("model/eos_token_ids", [257], "below vocab_size 257"),
        ("model/checkpoint_sha256", "A" * 64, "lower-case"),
        ("inputs/0/name", "ids", "exactly those of the interface"),
        ("inputs/0/dtype", "float8", "int64"),
        ("outputs/0/name", "present.0.key", "distinct"),
        ("k_ladder/0/k_cap", [4, 4], r"\[1, 3\]"),
        ("k_ladder/1/name", "full", "distinct"),
        ("k_ladder/1/cost", {"prefill": 1.0, "decode": 0.5}, "every rung or on none"),
        ("k_ladder/1/cost", {"prefill": 1.0, "decode": 0}, "above 0"),
        ("k_ladder/1/quality", {"metric": "perplexity"}, "must have the keys"),
        ("tasks/model/k_table", [1], "one value in"),
        ("tasks/model/k_table", [4, 1], r"\[1, 3\]"),
        ("tasks/model/k_ladder", [{"name": "full", "k_cap": [4, 3]}], r"\[1, 3\]"),
        ("size/task_bytes", {"other": 1}, "tasks of the bundle"),
        ("model/vocab_size", 100, "below vocab_size 100|as wide as vocab_size 100"),
        ("model/vocab_size", 1000, "as wide as vocab_size 1000"),
        ("inputs/0/dtype", "int32", "input_ids must be int64"),
        ("inputs/7/shape", [3], "k_cap must be int64"),
        ("outputs/0/dtype", "int64", "must be floating"),
        ("kv_cache/dtype", "float16", "as kv_cache says"),
        ("kv_cache/layers/1/heads", 7, "past_key_values.1.key must be as kv_cache says"),
        ("kv_cache/layers/0/value_dim", 3, "past_key_values.0.value must be"),
        ("files/..%2Fx", {"sha256": "a" * 64, "size": 1}, None),
        ("files/model.onnx", {"sha256": "short", "size": 1}, "sha256"),
    ],
)
def test_rules(manifest: Manifest, path: str, value: Any, message: str | None) -> None:
    document = copy.deepcopy(manifest.to_json())
    change(path, value)(document)
    if message is None:  # odd, but inside the bundle
        parse_manifest(document)
        return
    with pytest.raises(ManifestError, match=message):
        parse_manifest(document)


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/passwd", "a/../../x", "a//b", "./a", "a\\b", "C:x", "", ".", "a\0b",
     "manifest.json", "engines/x.engine", "a/"],
)  # fmt: skip
def test_file_names_stay_inside(manifest: Manifest, name: str) -> None:
    document = copy.deepcopy(manifest.to_json())
    change("files", {**document["files"], name: {"sha256": "a" * 64, "size": 1}})(document)  # type: ignore[dict-item]
    with pytest.raises(ManifestError):
        parse_manifest(document)


@pytest.mark.parametrize("name", ["../model", "a/b", "", ".hidden", "a b", "x" * 65, "a..b"])
def test_task_names_are_plain(manifest: Manifest, name: str) -> None:
    document: Any = copy.deepcopy(manifest.to_json())
    document["tasks"] = {name: document["tasks"]["model"] | {"graph": f"{name}.onnx"}}
    document["size"]["task_bytes"] = {}
    document["files"][f"{name}.onnx"] = document["files"]["model.onnx"]
    with pytest.raises(ManifestError):
        parse_manifest(document)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), value=JSON)
def test_any_change_is_read_or_refused(
    bundles: dict[str, Path], data: st.DataObject, value: Any
) -> None:
    document = json.loads((bundles["concat"] / "manifest.json").read_text())
    place: Any = document
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        if (
            not isinstance(place[key], (dict, list))
            or not place[key]
            or data.draw(st.booleans())
        ):
            break
        place = place[key]
    place[key] = value
    try:
        loaded = parse_manifest(document)
    except ManifestError:
        return
    assert parse_manifest(loaded.to_json()) == loaded
