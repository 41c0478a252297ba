"""What belongs to a checkpoint besides configuration and weights, and goes with them.

Tokenizers of many kinds, chat templates, settings of processors, a model card, a licence: all
small files are copied but those that tell of other weights. Files of code stay behind, since
config.json may not name any (`edgemoe.models.config.configuration`), and what names them in
other settings is left out: a tokenizer or a processor has the class that transformers knows.
"""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

from edgemoe.models.config.k_policy_file import FILE_NAME as K_POLICY
from edgemoe.models.config.ragged_note import FILE_NAME as RAGGED_NOTE
from edgemoe.models.config.remarks import remark_once
from edgemoe.models.gguf.reading import open_gguf
from edgemoe.models.quantised.notes import NOTE_FILES
from edgemoe_runtime.hub_cache import resolve_blob
from edgemoe_runtime.input_files import parse_strict

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import Any

_MOST_BYTES = 100_000_000  # the largest tokenizer.json of a published family has 33 MB
_OWN = {"config.json", K_POLICY, RAGGED_NOTE, *NOTE_FILES}
_WEIGHTS = {
    ".bin", ".ckpt", ".dduf", ".ggml", ".gguf", ".h5", ".msgpack", ".mlmodel", ".npy", ".npz",
    ".onnx", ".onnx_data", ".ot", ".pickle", ".pkl", ".pt", ".pte", ".pth", ".safetensors",
    ".tflite",
}  # fmt: skip
_INDEX = ".index.json"
_ADAPTER = "adapter_"
_CODE = ".py"
_NAMES_CODE = "auto_map"
_SETTINGS = "config.json"  # of tokenizers and processors; vocabularies are named otherwise
# Folders of chat templates that tokenizers name (transformers 4.52 and later).
_FOLDERS = ("additional_chat_templates",)


def copy_companions(source: Path, directory: Path) -> None:
    """Copy all small files of a checkpoint that are no configuration, weights or code.

    Args:
        source: Checkpoint that has them.
        directory: Checkpoint that gets them.
    """
    gguf = open_gguf(source)
    if gguf is not None:
        for name, content in gguf.settings.items():
            if name != "config.json":
                (directory / name).write_bytes(content)
        # What lies beside a file may belong to another one.
        return
    behind, changed = [], []
    for file in _files(source):
        plain = resolve_blob(source, file) if file.is_symlink() else file
        if plain is None or plain.stat().st_size > _MOST_BYTES or file.suffix == _CODE:
            behind.append(file.name)
            continue
        target = directory / file.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        settings = _without_code(plain) if file.name.endswith(_SETTINGS) else None
        if settings is None:
            shutil.copyfile(plain, target)
        else:
            changed.append(file.name)
            text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
            target.write_text(text, encoding="utf-8")
    if changed:
        remark_once(
            source, f"{_NAMES_CODE}, which names code, is left out of {', '.join(changed)}"
        )
    if behind:
        remark_once(
            source,
            "files of code, links to elsewhere and files above 100 MB are not copied: "
            f"{', '.join(behind[:5])}{' and more' if len(behind) > 5 else ''}",
        )


def _files(source: Path) -> Iterator[Path]:
    for folder in (source, *(source / name for name in _FOLDERS)):
        if not folder.is_dir() or (folder is not source and folder.is_symlink()):
            continue
        for file in sorted(folder.iterdir()):
            if file.is_file() and _is_companion(file.name):
                yield file


def _is_companion(name: str) -> bool:
    suffixes = {f".{part}" for part in name.split(".")[1:]}
    return not (
        name in _OWN
        or name.startswith((".", _ADAPTER))
        or name.endswith(_INDEX)
        or suffixes & _WEIGHTS
    )


def _without_code(file: Path) -> dict[str, Any] | None:
    """Read settings and leave out what names code; None where nothing does."""
    content = file.read_bytes()
    if f'"{_NAMES_CODE}"'.encode() not in content:
        return None
    try:
        settings = parse_strict(content, infinities=True)
    except ValueError:
        return None
    if not isinstance(settings, dict):
        return None
    # A processor's settings have a part for each of what it is made of.
    parts = [settings, *(part for part in settings.values() if isinstance(part, dict))]
    naming = [part for part in parts if isinstance(part.get(_NAMES_CODE), dict)]
    for part in naming:
        del part[_NAMES_CODE]
    return settings if naming else None
