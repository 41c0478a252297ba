"""manifest.json on disk: load, parse, check and save it."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from edgemoe_runtime.bundle.manifest import Manifest
from edgemoe_runtime.bundle.manifest_rules import check_manifest
from edgemoe_runtime.bundle.names import BUNDLE_FORMAT, MANIFEST_FILE, SCHEMA_VERSION
from edgemoe_runtime.errors import ManifestError
from edgemoe_runtime.json_fields import Json, Value, parse_json, read_plain_text

_MAX_MANIFEST_BYTES = 64 << 20  # 64 MiB: a manifest is kilobytes; more is not one


def load_manifest(directory: str | os.PathLike[str]) -> Manifest:
    """Read and check the manifest of a bundle.

    Args:
        directory: the bundle.

    Returns:
        The manifest; every rule of the format holds for it.

    Raises:
        ManifestError: when it is missing, of another schema version, or malformed.
    """
    path = Path(directory) / MANIFEST_FILE
    try:
        text = read_plain_text(path, _MAX_MANIFEST_BYTES)
    except FileNotFoundError as error:
        raise ManifestError(
            f"A bundle must hold {MANIFEST_FILE}, got none in {directory}. Give the"
            " directory that `edgemoe export -o` wrote, or export again: an interrupted"
            " export leaves no manifest."
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(
            f"{path} must be readable UTF-8 text, got: {error}. Check its permissions or"
            " export the bundle again."
        ) from error
    return parse_manifest(parse_json(text, str(path)))


def parse_manifest(document: Json) -> Manifest:
    """Build a manifest from a parsed JSON document, and check it.

    Args:
        document: content of manifest.json.

    Returns:
        The manifest; every rule of the format holds for it.

    Raises:
        ManifestError: when the document is not a manifest of this schema version.
    """
    manifest = Manifest.read(Value(_current(document), "manifest"))
    check_manifest(manifest)
    return manifest


def save_manifest(manifest: Manifest, directory: str | os.PathLike[str]) -> Path:
    """Check a manifest and write manifest.json whole or not at all; call it last.

    Args:
        manifest: what the bundle holds.
        directory: the bundle.

    Returns:
        The path of the file.

    Raises:
        ManifestError: when the manifest breaks a rule of the format.
        OSError: when the directory cannot be written.
    """
    check_manifest(manifest)
    folder = Path(directory)
    text = json.dumps(manifest.to_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    descriptor, temporary = tempfile.mkstemp(prefix=".manifest-", dir=folder)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes 0600; a bundle is as readable as its other files
        Path(temporary).chmod(0o644)
        Path(temporary).replace(folder / MANIFEST_FILE)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return folder / MANIFEST_FILE


def _current(document: Json) -> Json:
    """Return a document of this schema version; version 1 did not say what release it needs."""
    if not isinstance(document, dict) or document.get("format") != BUNDLE_FORMAT:
        raise ManifestError(
            f'A manifest must be a JSON object with "format": "{BUNDLE_FORMAT}", got another'
            " file. Give the directory that `edgemoe export -o` wrote."
        )
    version = document.get("schema_version")
    if version not in (1, SCHEMA_VERSION) or isinstance(version, bool):
        writer = document.get("created_by", "an unknown program")
        raise ManifestError(
            f"schema_version must be 1 or {SCHEMA_VERSION}, got {version!r} written by"
            f" {writer}. Install the edgemoe that wrote the bundle, or export it again with"
            " this one."
        )
    if version == 1 and "needs_onnxruntime" not in document:
        quantised = document.get("precision") in ("int8", "int4")
        needed = "1.31" if quantised else "1.28" if document.get("flavour") == "ort" else "1.23"
        return {**document, "needs_onnxruntime": needed}
    return document
