"""Look at a checkpoint's files before anything is loaded from them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from edgemoe.errors import CheckpointError
from edgemoe.file_kinds import describe_mistake
from edgemoe.models.gguf.paths import SUFFIX as GGUF_SUFFIX
from edgemoe.models.gguf.reading import open_gguf
from edgemoe_runtime.bundle.names import MANIFEST_FILE
from edgemoe_runtime.input_files import parse_strict, read_file
from edgemoe_runtime.messages import quote

if TYPE_CHECKING:
    from pathlib import Path

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_ADAPTER = "adapter_config.json"
_ADAPTER_FILES = (_ADAPTER, "adapter_model.safetensors", "adapter_model.bin")
_PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}


def read_json_object(path: Path, content: bytes | None = None) -> dict[str, Any]:
    """Read a JSON file that must hold one object.

    Args:
        path: The file.
        content: What it holds, where that was read already.

    Returns:
        The object.

    Raises:
        CheckpointError: The file is missing, not UTF-8 JSON, or not an object.
    """
    try:
        content = read_file(path) if content is None else content
        # Published configurations have bare infinities, where a limit is open.
        found = parse_strict(content, infinities=True)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"a checkpoint must have {path.name}, got none in {path.parent}. Give the "
            "directory of a Hugging Face checkpoint."
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} must be a JSON object, got {error}. Copy the checkpoint again."
        ) from error
    if not isinstance(found, dict):
        raise CheckpointError(
            f"{path} must be a JSON object, got a {type(found).__name__}. Copy the checkpoint "
            "again."
        )
    return found


def check_directory(path: Path) -> None:
    """Refuse what cannot be a checkpoint directory.

    Args:
        path: What the user named.

    Raises:
        CheckpointError: It is missing, a file, a bundle, or has files of an adapter.
    """
    rule = "checkpoint must be a directory or a GGUF file"
    if not path.exists():
        raise CheckpointError(f"{rule}, got {path}, which does not exist.")
    if path.suffix == GGUF_SUFFIX and path.is_file():
        return
    if not path.is_dir():
        if path.suffix in _PICKLE_SUFFIXES:
            raise CheckpointError(
                f"{rule}, got the file {path}. Pickles run code when opened: save the model as "
                "safetensors."
            )
        raise CheckpointError(
            f"{rule}, got {describe_mistake(path)}. Give the directory that holds config.json "
            "and the safetensors files, or a file that ends in .gguf."
        )
    if (path / MANIFEST_FILE).exists() and not (path / _SINGLE).exists():
        raise CheckpointError(
            f"checkpoint must be a Hugging Face directory, got the bundle {path}. Give the "
            "checkpoint that it was exported from."
        )
    check_no_adapter(path)


def check_no_adapter(path: Path) -> None:
    """Refuse an adapter, and weights that one lies beside.

    Whether weights contain an adapter already cannot be seen, and transformers adds it to them
    where peft is installed and only there.

    Args:
        path: Checkpoint directory.

    Raises:
        CheckpointError: There are files of an adapter.
    """
    found = [name for name in _ADAPTER_FILES if (path / name).exists()]
    if not found:
        return
    if any((path / name).exists() for name in (_SINGLE, _INDEX)):
        raise CheckpointError(
            f"a checkpoint must be weights without an adapter, got {found[0]} beside them in "
            f"{path}. Where the adapter is merged into the weights, move its files elsewhere; "
            "where it is not, merge it first with merge_and_unload() of peft."
        )
    base = ""
    if (path / _ADAPTER).exists():
        named = read_json_object(path / _ADAPTER).get("base_model_name_or_path")
        base = f" of {quote(named)}" if named else ""
    raise CheckpointError(
        f"a checkpoint must have weights, got an adapter{base} alone in {path}. Merge it into "
        "its model first: peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()"
        ".save_pretrained(directory)."
    )


def check_weights(path: Path) -> list[Path]:
    """Check that the weights are safetensors, all there, and whole.

    Args:
        path: Checkpoint directory.

    Returns:
        The weight files, in order.

    Raises:
        CheckpointError: Weights are pickles, missing, truncated, or not as the index says, or
            an adapter lies beside them.
    """
    gguf = open_gguf(path)
    if gguf is not None:
        return gguf.files
    check_no_adapter(path)
    # transformers prefers the single file where there are both.
    single = path / _SINGLE
    if single.exists():
        read_tensor_names(single)
        return [single]
    index = path / _INDEX
    if index.exists():
        return _check_shards(path, read_json_object(index))
    pickles = sorted(file.name for file in path.iterdir() if file.suffix in _PICKLE_SUFFIXES)
    if pickles:
        raise CheckpointError(
            f"weights must be safetensors, got the pickle {pickles[0]} in {path}. Pickles run "
            "code when opened; convert it where you trust it: load it with transformers and "
            "call save_pretrained()."
        )
    raise CheckpointError(
        f"a checkpoint must have {_SINGLE} or {_INDEX}, got neither in {path}. Copy the "
        "checkpoint again, weights included."
    )


def _check_shards(path: Path, index: dict[str, Any]) -> list[Path]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{path / _INDEX} must map tensors to files in weight_map, got "
            f"{type(weight_map).__name__}. Copy the checkpoint again."
        )
    shards: dict[str, set[str]] = {}
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or "/" in shard or "\\" in shard:
            raise CheckpointError(
                f"{path / _INDEX} must name files of its own directory, got {shard!r} for "
                f"{tensor}. Do not use this checkpoint unless you know who wrote it."
            )
        if not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"weights must be safetensors, got {shard} for {tensor} in {path / _INDEX}. "
                "Convert the checkpoint where you trust it: load it and call save_pretrained()."
            )
        shards.setdefault(shard, set()).add(tensor)
    for shard, tensors in sorted(shards.items()):
        if not (path / shard).exists():
            raise CheckpointError(
                f"{_INDEX} names the file {shard}, got no such file in {path}. Copy the "
                "checkpoint again, all shards included."
            )
        absent = tensors - read_tensor_names(path / shard)
        if absent:
            raise CheckpointError(
                f"{_INDEX} places {min(absent)} in {shard}, got a file without it. Copy the "
                "checkpoint again, from one version."
            )
    return [path / shard for shard in sorted(shards)]


def read_tensor_names(file: Path) -> set[str]:
    """Read the header of a safetensors file; the format's own checks compare it to the size.

    Args:
        file: A safetensors file.

    Returns:
        Names of its tensors.

    Raises:
        CheckpointError: The file is truncated or malformed.
    """
    try:
        with safe_open(file, framework="numpy") as opened:
            return set(opened.keys())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} must be a whole safetensors file, got {file.stat().st_size} bytes: "
            f"{error}. Copy it again."
        ) from error


def read_small(file: Path) -> bytes:
    """Read a file of settings.

    Args:
        file: A regular file.

    Returns:
        Its content.

    Raises:
        CheckpointError: It cannot be read.
    """
    try:
        return read_file(file)
    except OSError as error:
        raise CheckpointError(
            f"{file} must be readable, got: {error.strerror}. Copy the checkpoint again."
        ) from error
