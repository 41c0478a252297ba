"""Links of a hub's cache are as good as files; others are refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from edgemoe_runtime.hub_cache import resolve_blob

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    repository = tmp_path / "models--a--b"
    found = repository / "snapshots" / "0123"
    (found / "folder").mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "blobs" / "cafe").write_text("content")
    return found


def test_links_into_the_repositorys_blobs_are_followed(snapshot: Path) -> None:
    (snapshot / "file").symlink_to("../../blobs/cafe")
    (snapshot / "folder" / "deep").symlink_to("../../../blobs/cafe")
    blob = snapshot.parent.parent / "blobs" / "cafe"

    assert resolve_blob(snapshot, snapshot / "file") == blob
    assert resolve_blob(snapshot, snapshot / "folder" / "deep") == blob


def test_links_elsewhere_are_not(snapshot: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("secret")
    other = tmp_path / "models--c--d" / "blobs"
    other.mkdir(parents=True)
    (other / "cafe").write_text("of another repository")
    blobs = snapshot.parent.parent / "blobs"
    (blobs / "out").symlink_to(tmp_path / "outside")
    (blobs / "inner").mkdir()
    (blobs / "inner" / "x").write_text("deeper")
    for name, target in {
        "outside": tmp_path / "outside",
        "other": other / "cafe",
        "chained": blobs / "out",
        "folder_in_blobs": blobs / "inner" / "x",
        "broken": blobs / "none",
        "circle": snapshot / "circle",
        "directory": blobs,
    }.items():
        (snapshot / name).symlink_to(target)
        assert resolve_blob(snapshot, snapshot / name) is None, name


def test_a_folder_that_is_no_snapshot_has_no_blobs(tmp_path: Path) -> None:
    bundle = tmp_path / "some" / "bundle"
    bundle.mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "cafe").write_text("content")
    (bundle / "file").symlink_to(tmp_path / "blobs" / "cafe")

    assert resolve_blob(bundle, bundle / "file") is None
