"""What config.json says: of the language model alone, and nothing that chooses code.

Newer checkpoints wrap the language model: its settings are the part `text_config`, but a few
stand beside that part and hold for it too. Some entries choose what code runs, up to kernels
that are fetched from a hub; none of them is obeyed here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgemoe.errors import CheckpointError, FamilyError
from edgemoe.models.loading import quiet_transformers
from edgemoe.models.registry import Family, find_family, unknown_family
from edgemoe.models.transformers_internals import read_special_floats
from edgemoe_runtime.messages import clip, quote

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from transformers import PreTrainedConfig

_FILE = "config.json"

# Entries that name classes, files of code, or kernels. transformers saves the last three.
_CODE_ENTRIES = {
    "allow_all_kernels",
    "auto_map",
    "compile_config",
    "custom_pipelines",
    "fusion_config",
    "kernel_config",
    "trust_remote_code",
    "use_kernels",
}
_CODE_ENDINGS = ("_implementation", "_implementation_internal", "_implementation_autoset")

# What holds for the language model also where it stands beside its part: transformers ties
# weights by the outermost entry, and tokens and types belong to the whole.
_OF_THE_WHOLE = (
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "max_position_embeddings",
    "pad_token_id",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "torch_dtype",
    "vocab_size",
)


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """A config.json that was read.

    Attributes:
        whole: The checkpoint's configuration.
        text: That of its language model; the same where the checkpoint is nothing else.
        dropped: Entries that choose code, which are not in either, such as
            `text_config.attn_implementation`.
        entries: What the file says of the language model, in its own spellings.
    """

    whole: PreTrainedConfig
    text: PreTrainedConfig
    dropped: tuple[str, ...]
    entries: Mapping[str, Any]

    @property
    def family(self) -> Family:
        """The language model's family; `FamilyError` where that is not supported."""
        model_type = self.whole.model_type
        return find_family(
            self.text.model_type, wrapper=None if self.whole is self.text else model_type
        )


def check_family(content: Mapping[str, Any]) -> None:
    """Refuse a family by its name, before other entries are looked at.

    Args:
        content: The JSON object of a config.json.

    Raises:
        FamilyError: It is not supported, whatever the other entries say.
    """
    from transformers import CONFIG_MAPPING

    model_type = content.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise unknown_family(model_type)
    if not CONFIG_MAPPING[model_type].sub_configs:
        find_family(model_type)


def read_configuration(path: Path, content: Mapping[str, Any]) -> Configuration:
    """Read a config.json of any family that transformers knows.

    Args:
        path: The file, for messages.
        content: Its JSON object.

    Returns:
        The configuration.

    Raises:
        FamilyError: transformers does not know the family.
        CheckpointError: An entry is not what the family wants.
    """
    from transformers import CONFIG_MAPPING

    model_type = content.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise unknown_family(model_type)
    dropped: list[str] = []
    kept = _without_code(content, dropped)
    try:
        configuration = CONFIG_MAPPING[model_type]
        with quiet_transformers():
            # JSON has no infinity; transformers writes it as an object.
            whole: PreTrainedConfig = configuration.from_dict(
                read_special_floats(configuration, kept)
            )
        text: PreTrainedConfig = whole.get_text_config(decoder=True)
        if text is not whole:
            _move_in(kept, whole, text)
    except Exception as error:  # the strict dataclasses of the hub raise their own classes
        raise CheckpointError(
            f"{path} must be a {model_type} configuration, got: {clip(str(error))}. Correct "
            "the entry."
        ) from error
    if text.is_encoder_decoder or not isinstance(text.model_type, str):
        raise FamilyError(
            f"a model must be a decoder alone, got {quote(model_type)}, which has an encoder "
            "before it. Give the checkpoint of a language model."
        )
    return Configuration(
        whole=whole,
        text=text,
        dropped=tuple(sorted(dropped)),
        entries=kept if text is whole else _part_of(kept, text),
    )


def _without_code(
    content: Mapping[str, Any], dropped: list[str], at: str = ""
) -> dict[str, Any]:
    """Copy settings but for those that choose code; tell where those stood."""
    kept: dict[str, Any] = {}
    for name, value in content.items():
        if name in _CODE_ENTRIES or name.endswith(_CODE_ENDINGS):
            if value not in (None, False) and not name.endswith("_autoset"):
                dropped.append(f"{at}{name}")
        elif isinstance(value, dict):
            kept[name] = _without_code(value, dropped, f"{at}{name}.")
        else:
            kept[name] = value
    return kept


def _move_in(content: Mapping[str, Any], whole: Any, text: Any) -> None:
    """Give the language model the settings that stand beside its part."""
    own = _part_of(content, text)
    for name in _OF_THE_WHOLE:
        if content.get(name) is not None and own.get(name) is None:
            setattr(text, name, content[name])
    tied = getattr(whole, "tie_word_embeddings", None)
    if tied is not None:
        text.tie_word_embeddings = tied


def _part_of(content: Mapping[str, Any], text: Any) -> Mapping[str, Any]:
    """Return the entries of the language model."""
    named = (part for part in _parts(content) if part.get("model_type") == text.model_type)
    return next(named, content.get("text_config") or {})


def _parts(content: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for value in content.values():
        if isinstance(value, dict):
            yield value
            yield from _parts(value)
