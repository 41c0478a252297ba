"""Bundles that were altered are refused before an engine opens them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from edgemoe_runtime import IntegrityError, RequestError, Session, verify_bundle
from edgemoe_runtime.bundle.engine_cache import hash_file
from edgemoe_runtime.bundle.file_entry import FileEntry
from edgemoe_runtime.bundle.manifest_file import load_manifest, save_manifest

Build = Callable[..., Path]


def list_again(folder: Path, *names: str) -> None:
    """Put the files' true digests into the manifest, as one who can write both would."""
    manifest = load_manifest(folder)
    files = dict(manifest.files)
    for name in names:
        path = folder / name
        files[name] = FileEntry(sha256=hash_file(path), size=path.stat().st_size)
    save_manifest(replace(manifest, files=files), folder)


def alter_external(folder: Path, **entries: str) -> None:
    path = str(folder / "model.onnx")
    model = onnx.load(path, load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.external_data)
    for entry in tensor.external_data:
        if entry.key in entries:
            entry.value = entries.pop(entry.key)
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    Path(path).write_bytes(model.SerializeToString())
    list_again(folder, "model.onnx")


def test_a_whole_bundle_passes(build_bundle: Build) -> None:
    folder = build_bundle(["alpha", "beta"])
    verified = verify_bundle(folder)
    assert verified.tasks == ("alpha", "beta")
    assert verified.hashed_files == 5
    assert verify_bundle(folder, tasks=["beta"]).hashed_files == 3
    (folder / "engines").mkdir()
    (folder / "engines" / "x.engine").write_bytes(b"a cache may grow")
    assert verify_bundle(folder, hashes=False).hashed_files == 0


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "tokenizer.json"])
def test_a_flipped_bit_is_found(build_bundle: Build, name: str) -> None:
    folder = build_bundle()
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(IntegrityError):
        Session.open(folder)


def test_a_listed_file_is_not_therefore_a_weight_file(build_bundle: Build) -> None:
    """Engines give some names a meaning of their own; this one is a memory address."""
    folder = build_bundle()
    name = "*/_ORT_MEM_ADDR_/*"
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_bytes(bytes(1 << 20))
    list_again(folder, name)
    verify_bundle(folder)
    alter_external(folder, location=name, offset="0", length="4")
    with pytest.raises(IntegrityError, match="file of the bundle"):
        verify_bundle(folder)


def test_what_is_used_is_the_manifest_that_was_checked(build_bundle: Build) -> None:
    folder = build_bundle()
    old = load_manifest(folder)
    data = folder / "tokenizer.json"
    data.write_bytes(data.read_bytes() + b" ")
    list_again(folder, "tokenizer.json")
    verify_bundle(folder)
    with pytest.raises(IntegrityError, match=r"tokenizer\.json must be"):
        verify_bundle(folder, manifest=old)
    with pytest.raises(RequestError, match="gamma"):
        verify_bundle(folder, tasks=["gamma"])


def test_missing_extra_and_short_files(build_bundle: Build) -> None:
    folder = build_bundle()
    (folder / "extra.so").write_bytes(b"x")
    with pytest.raises(IntegrityError, match=r"extra\.so"):
        verify_bundle(folder)
    (folder / "extra.so").unlink()
    (folder / "nested").mkdir()
    (folder / "nested" / "more").write_bytes(b"x")
    with pytest.raises(IntegrityError, match="nested/more"):
        verify_bundle(folder)
    folder = build_bundle()
    with (folder / "model.onnx.data").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(IntegrityError, match="bytes, got 100"):
        verify_bundle(folder, hashes=False)
    (folder / "model.onnx.data").unlink()
    with pytest.raises(IntegrityError, match="missing"):
        verify_bundle(folder, hashes=False)


def test_links_are_refused(build_bundle: Build, tmp_path: Path) -> None:
    folder = build_bundle()
    data, outside = folder / "model.onnx.data", tmp_path / "outside"
    os.link(data, outside)
    with pytest.raises(IntegrityError, match="hard links"):
        Session.open(folder, verify=False)
    data.unlink()
    data.symlink_to(outside)
    with pytest.raises(IntegrityError, match="symbolic link"):
        Session.open(folder, verify=False)
    folder = build_bundle()
    (tmp_path / "elsewhere").mkdir()
    (folder / "engines").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(IntegrityError, match="engines"):
        verify_bundle(folder)
    (folder / "engines").unlink()
    (folder / "folder").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(IntegrityError, match="folder"):
        verify_bundle(folder)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"location": "../outside"}, "file of the bundle"),
        ({"location": "/etc/passwd"}, "file of the bundle"),
        ({"location": "./model.onnx.data"}, "file of the bundle"),
        ({"location": "x/../model.onnx.data"}, "file of the bundle"),
        ({"location": "*/_ORT_MEM_ADDR_/*"}, "file of the bundle"),
        ({"location": ""}, "file of the bundle"),
        ({"location": "manifest.json"}, "file of the bundle"),
        ({"location": "tokenizer.json", "offset": "0", "length": "4"}, "file of the bundle"),
        ({"offset": "999999999"}, "end within"),
        ({"length": "999999999"}, "end within"),
        ({"offset": "-4"}, "decimal offset"),
        ({"offset": "0x10"}, "decimal offset"),
        ({"length": "9" * 40}, "decimal length"),
        ({"base_path": "/etc"}, "at most"),
    ],
)
def test_external_data_stays_inside(
    build_bundle: Build, tmp_path: Path, entries: dict[str, str], message: str
) -> None:
    (tmp_path / "outside").write_bytes(bytes(1 << 20))
    folder = build_bundle()
    alter_external(folder, **entries)
    with pytest.raises(IntegrityError, match=message):
        Session.open(folder, verify=False)


def test_a_repeated_key_is_refused(build_bundle: Build) -> None:
    folder = build_bundle()
    path = folder / "model.onnx"
    model = onnx.load(str(path), load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.external_data)
    tensor.external_data.add(key="location", value="../outside")
    path.write_bytes(model.SerializeToString())
    list_again(folder, "model.onnx")
    with pytest.raises(IntegrityError, match="each"):
        verify_bundle(folder)


def test_native_code_and_other_ends_are_refused(build_bundle: Build) -> None:
    folder = build_bundle()
    path = folder / "model.onnx"
    whole = path.read_bytes()
    model = onnx.load(str(path), load_external_data=False)
    model.graph.node.append(
        onnx.helper.make_node("EPContext", [], ["blob"], domain="com.microsoft")
    )
    path.write_bytes(model.SerializeToString())
    list_again(folder, "model.onnx")
    with pytest.raises(IntegrityError, match="native code"):
        verify_bundle(folder)
    for change, message in ((("input", "k_cap"), "inputs"), (("output", "logits"), "outputs")):
        model = onnx.load_from_string(whole)
        value = next(v for v in getattr(model.graph, change[0]) if v.name == change[1])
        value.name = "renamed"
        path.write_bytes(model.SerializeToString())
        list_again(folder, "model.onnx")
        with pytest.raises(IntegrityError, match=message):
            verify_bundle(folder)
    model = onnx.load_from_string(whole)
    model.graph.output[0].type.tensor_type.shape.dim[2].dim_value = 99
    path.write_bytes(model.SerializeToString())
    list_again(folder, "model.onnx")
    with pytest.raises(IntegrityError, match="output logits"):
        verify_bundle(folder)
