"""Every private name of transformers that edgemoe relies on, in one place.

A release of transformers may rename any of them without notice: the tests beside this file
(`tests/edgemoe/models/test_transformers_internals.py`) try each one, so that an update fails
there, by name, and is mended here. Tried with transformers 5.20 to 5.24.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import torch
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel


def keeps_experts_contract(candidate: type) -> bool:
    """Return whether a class was decorated with `use_experts_implementation`."""
    return hasattr(candidate, "_apply_gate")


def apply_gate(experts: Any, units: torch.Tensor) -> torch.Tensor:
    """Run what gated experts do between their two products.

    Args:
        experts: An experts module with a gate.
        units: What the first product gives, in the family's order [tokens, 2 * intermediate].

    Returns:
        What the second product is given [tokens, intermediate].
    """
    return cast("torch.Tensor", experts._apply_gate(units))


def mark_initialised(held: torch.Tensor | nn.Module, *, initialised: bool = True) -> None:
    """Mark a tensor or module as loaded, so that transformers does not draw its values.

    Args:
        held: What was put into a model.
        initialised: False asks transformers to draw its values.
    """
    vars(held)["_is_hf_initialized"] = initialised


def draw_weights(model: PreTrainedModel, module: nn.Module) -> None:
    """Draw a module's weights as the family begins a training with them.

    Args:
        model: The model that the module is part of.
        module: What to draw; tensors that are marked as loaded keep their values.
    """
    cast("Any", model)._init_weights(module)


def move_from_meta(model: PreTrainedModel, names: Iterable[str], device: str) -> None:
    """Allocate tensors that no checkpoint holds on a device, without values.

    Args:
        model: A model that is on the meta device.
        names: Tensors that a checkpoint may lack.
        device: Such as `cpu`.
    """
    move = cast("Any", model)._move_missing_keys_from_meta_to_device
    move(names, {"": device}, None, None)


def compute_unstored(model: PreTrainedModel) -> None:
    """Compute what no checkpoint holds, such as rotary tables.

    Args:
        model: A model whose loaded tensors are marked, see `mark_initialised`.
    """
    cast("Any", model)._initialize_missing_keys(False)


def optional_patterns(model: PreTrainedModel) -> Sequence[str]:
    """Return regular expressions of tensors that the family's checkpoints may lack."""
    return cast("Any", model)._keys_to_ignore_on_load_missing or ()


def needless_patterns(model: PreTrainedModel) -> Sequence[str]:
    """Return regular expressions of tensors that checkpoints have and the family leaves out."""
    return cast("Any", model)._keys_to_ignore_on_load_unexpected or ()


def dtype_plan(model: PreTrainedModel, dtype: torch.dtype) -> Mapping[str, torch.dtype]:
    """Return which tensors stay in another type than the model's, by parts of their names."""
    found: Mapping[str, torch.dtype] = cast("Any", model)._get_dtype_plan(dtype)
    return found


def set_saving_rules(model: PreTrainedModel, rules: Sequence[Any]) -> None:
    """Set the conversions that `save_pretrained` reverts when it writes a checkpoint.

    Args:
        model: The model.
        rules: Those of `transformers.conversion_mapping` that its checkpoint was read with.
    """
    cast("Any", model)._weight_conversions = rules


def read_special_floats(
    configuration: type[PreTrainedConfig], content: Mapping[str, Any]
) -> dict[str, Any]:
    """Turn the objects that stand for infinities in a config.json into numbers.

    Args:
        configuration: The family's class.
        content: The file's JSON object.

    Returns:
        The same with numbers; JSON has no infinity.
    """
    found: dict[str, Any] = cast("Any", configuration)._decode_special_floats(dict(content))
    return found


def attention_implementation(config: PreTrainedConfig) -> str | None:
    """Return the name of the attention that a model runs; None for the family's default."""
    found: str | None = cast("Any", config)._attn_implementation
    return found


def set_attention_implementation(config: PreTrainedConfig, name: str | None) -> None:
    """Choose the attention that a model runs, also while it is built.

    Args:
        config: The configuration that the model's layers hold.
        name: As registered with transformers' `AttentionInterface`.
    """
    cast("Any", config)._attn_implementation = name
