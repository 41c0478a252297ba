"""Cache engines in the bundle: look up by key, write whole or not at all."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from edgemoe.staging import staged_file
from edgemoe_runtime.bundle.engine_cache import EngineKey, hash_file
from edgemoe_runtime.bundle.names import ENGINES_FOLDER
from edgemoe_runtime.errors import ManifestError

if TYPE_CHECKING:
    from pathlib import Path

_DIFFERENCES = {
    "graph_sha256": "another graph or other weights",
    "shapes": "another range of shapes",
    "flags": "other builder flags",
}


def engine_path(bundle: Path, key: EngineKey) -> Path:
    """Return where the engine of a key is kept."""
    return bundle / ENGINES_FOLDER / key.file_name


def key_path(engine: Path) -> Path:
    """Return where the key of an engine is kept."""
    return engine.with_suffix(".json")


def script_path(engine: Path) -> Path:
    """Return where the command that builds an engine by hand is kept."""
    return engine.with_suffix(".sh")


def look_up(engine: Path, wanted: EngineKey) -> EngineKey | str:
    """Return the key of a cached engine, or the reason why it has to be built.

    Args:
        engine: Where it is kept.
        wanted: The key it must have been built from; its digest and size of the engine are
            not looked at.
    """
    if not engine.exists():
        return "there is none yet"
    try:
        found = EngineKey.load(key_path(engine))
    except ManifestError as error:
        return f"its key cannot be read: {error}"
    for name, words in _DIFFERENCES.items():
        if getattr(found, name) != getattr(wanted, name):
            return f"it was built from {words}"
    if replace(found, engine_sha256="", engine_size=0, command=wanted.command) != wanted:
        return "it was built for something else"
    if engine.is_symlink() or not engine.is_file():
        return "it is not a regular file"
    if engine.stat().st_size != found.engine_size or hash_file(engine) != found.engine_sha256:
        return "it is damaged"
    return found


def store(engine: Path, content: memoryview, wanted: EngineKey, script: str) -> EngineKey:
    """Write an engine, its script and its key.

    The key is written last: an interrupted write leaves an engine that does not fit its key,
    which is built again.

    Args:
        engine: Where to keep it.
        content: The serialised engine.
        wanted: The key it was built from.
        script: The script that builds it by hand.

    Returns:
        The key, with digest and size of the engine.

    Raises:
        OutputError: The disk refuses.
    """
    with staged_file(engine, force=True) as staged:
        staged.write_bytes(content)
        key = replace(wanted, engine_sha256=hash_file(staged), engine_size=content.nbytes)
    with staged_file(script_path(engine), force=True) as staged:
        staged.write_text(script, encoding="utf-8")
        staged.chmod(0o755)
    with staged_file(key_path(engine), force=True) as staged:
        staged.write_text(key.dumps(), encoding="utf-8")
    return key
