"""Where tools write that a checkpoint's weights are quantised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgemoe.errors import CheckpointError
from edgemoe_runtime.input_files import parse_strict, read_file
from edgemoe_runtime.messages import clip

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

# In config.json: transformers and most tools; compressed-tensors before 0.5; MLX.
NOTE_ENTRIES = ("quantization_config", "compression_config", "quantization")
# Beside it: ModelOpt; AutoGPTQ; AutoAWQ; TorchAO and Quanto.
NOTE_FILES = (
    "hf_quant_config.json",
    "quantize_config.json",
    "quant_config.json",
    "quantization.json",
)
_METHODS = ("quant_method", "quant_algo", "format", "bits", "w_bit")


@dataclass(frozen=True, kw_only=True)
class QuantisationNote:
    """What a checkpoint announces.

    Attributes:
        place: Where, such as `hf_quant_config.json` or `text_config.quantization_config`.
        method: In the tool's words, such as `FP8`; "" where it gives none.
        settings: All that it says there.
    """

    place: str
    method: str
    settings: Mapping[str, Any]

    @property
    def is_in_config(self) -> bool:
        """Whether config.json says it, and not a file that may be a remnant."""
        return self.place not in NOTE_FILES

    def __str__(self) -> str:
        """Return it as part of a message."""
        kind = f" {self.method}" if self.method else ""
        return (
            f"{self.place}{' of config.json' if self.is_in_config else ''} with{kind} settings"
        )


def find_quantisation_note(
    content: Mapping[str, Any], read: Callable[[str], bytes | None]
) -> QuantisationNote | None:
    """Find what announces that weights are quantised.

    Args:
        content: The JSON object of config.json.
        read: Reads a small file beside it by its name; None where there is none.

    Returns:
        The first note; None where there is none, or all say that nothing is quantised.

    Raises:
        CheckpointError: A file that would announce it is no JSON object, has a key twice, or a
            number that is none.
    """
    nested = ((f"{name}.", part) for name, part in content.items() if isinstance(part, dict))
    for prefix, part in (("", content), *nested):
        for name in NOTE_ENTRIES:
            if isinstance(part.get(name), dict) and part[name]:
                return _note(f"{prefix}{name}", part[name])
    for name in NOTE_FILES:
        found = read(name)
        settings = None if found is None else _parse(name, found)
        if settings:
            inner = settings.get("quantization")
            note = _note(name, inner if isinstance(inner, dict) else settings)
            # A tool writes its file also where it quantises nothing but the cache of keys.
            if note.method:
                return note
    return None


def reader_beside(path: Path) -> Callable[[str], bytes | None]:
    """Return what reads small files of a checkpoint.

    Args:
        path: Checkpoint directory.

    Returns:
        A function from a name to what the file holds; None where there is none.
    """

    def read(name: str) -> bytes | None:
        return read_file(path / name) if (path / name).is_file() else None

    return read


def _parse(name: str, content: bytes) -> dict[str, Any]:
    try:
        settings = parse_strict(content, infinities=True)
    except (ValueError, RecursionError) as error:
        got = clip(str(error))
    else:
        if isinstance(settings, dict):
            return settings
        got = type(settings).__name__
    raise CheckpointError(
        f"{name} must be a JSON object, since it may say how weights are stored, got {got}. "
        "Copy it again, or remove it where the weights are plain."
    )


def _note(place: str, settings: Mapping[str, Any]) -> QuantisationNote:
    named = (settings.get(name) for name in _METHODS)
    method = next((value for value in named if isinstance(value, str | int)), "")
    return QuantisationNote(place=place, method=clip(str(method)), settings=settings)


def without_notes(content: Mapping[str, Any]) -> dict[str, Any]:
    """Copy settings but for what announces quantised weights.

    Args:
        content: The JSON object of config.json.

    Returns:
        The same without; weights that were dequantised are plain.
    """
    return {
        name: {
            n: v for n, v in part.items() if n not in NOTE_ENTRIES or not isinstance(v, dict)
        }
        if isinstance(part, dict)
        else part
        for name, part in content.items()
        if name not in NOTE_ENTRIES or not isinstance(part, dict)
    }


def quantised_message(path: Path, got: str) -> str:
    """Say that weights are quantised in a way that is not read.

    Args:
        path: The checkpoint.
        got: What shows it.

    Returns:
        Rule, value and remedy.
    """
    return (
        f"{path} must hold plain weights or a quantised form that edgemoe reads, got {got}. "
        "Use the checkpoint that it was quantised from."
    )
