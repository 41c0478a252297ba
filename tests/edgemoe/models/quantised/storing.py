"""Store plain checkpoints in the forms that producers of quantised ones write.

Each `*_parts` quantises one weight and says what the producers' own arithmetic makes of it.
"""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from safetensors.torch import load_file, save_file

from edgemoe.models.tiny import write_tiny_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

Tensors: TypeAlias = "dict[str, torch.Tensor]"
# From a weight's name and contents to what is stored in its place, and what that means.
Store: TypeAlias = "Callable[[str, torch.Tensor], tuple[Tensors, torch.Tensor]]"


def write_both(
    family: str,
    folder: Path,
    store: Store,
    announce: Mapping[str, Any],
    *,
    beside: str | None = None,
    chosen: Callable[[str, torch.Tensor], bool] | None = None,
) -> tuple[Path, Path]:
    """Write a tiny checkpoint quantised, and plain with the numbers that this means.

    Returns:
        The quantised one and the plain one.
    """
    plain = write_tiny_checkpoint(family, folder / "plain", dtype=torch.bfloat16)
    stored: Tensors = {}
    meant: Tensors = {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        if (chosen or is_linear)(name, tensor):
            parts, means = store(name, tensor)
            meant[name] = means.contiguous()
            stored.update({key: part.contiguous() for key, part in parts.items()})
        else:
            stored[name] = meant[name] = tensor
    quantised = folder / "quantised"
    shutil.copytree(plain, quantised)
    save_file(meant, plain / "model.safetensors", {"format": "pt"})
    save_file(stored, quantised / "model.safetensors", {"format": "pt"})
    if beside is None:
        announce_in_config(quantised, announce)
    else:
        (quantised / beside).write_text(json.dumps(announce))
    return quantised, plain


def is_linear(name: str, tensor: torch.Tensor) -> bool:
    kept = ("embed_tokens", "lm_head", ".gate.weight", "router")
    return tensor.dim() == 2 and name.endswith("weight") and not any(k in name for k in kept)


def announce_in_config(path: Path, announce: Mapping[str, Any]) -> None:
    file = path / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "quantization_config": dict(announce)}))


def change_tensors(path: Path, changes: Mapping[str, torch.Tensor | None]) -> None:
    file = path / "model.safetensors"
    found = {**load_file(file), **changes}
    save_file({k: v for k, v in found.items() if v is not None}, file, {"format": "pt"})


def fp8_parts(name: str, weight: torch.Tensor, shape: tuple[int, ...]) -> tuple[Tensors, Any]:
    """Return numbers of FP8 e4m3 and random scales of a shape, float32."""
    scale = torch.rand(shape) * 0.01 + 0.001
    stored = (weight.float() * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {name: stored}, scale
