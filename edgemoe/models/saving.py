"""Write checkpoints: plain Hugging Face ones wherever transformers can express them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from transformers import GenerationConfig

from edgemoe.disk import describe_full
from edgemoe.errors import OutputError
from edgemoe.models.config.companions import copy_companions
from edgemoe.models.config.entries import complete_entries
from edgemoe.models.config_width import width_entries
from edgemoe.models.k_policy import save_k_policy
from edgemoe.models.layers.factored import ranks_of
from edgemoe.models.loading import quiet_transformers
from edgemoe.models.quantised.notes import NOTE_ENTRIES
from edgemoe.models.ragged import RaggedNote
from edgemoe_runtime.input_files import parse_strict, read_file

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from transformers import PreTrainedConfig, PreTrainedModel

    from edgemoe.models.contract import MoeModel
    from edgemoe.models.shapes import Ranks


def save_model(
    model: MoeModel,
    directory: Path,
    *,
    source: Path | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Write a model, in the floating type that its checkpoint is stored in.

    Equal numbers of whole experts in all layers give a plain Hugging Face checkpoint; different
    ones, widths that config.json cannot say, factored experts and such that share bases add
    `edgemoe.json`, and then only edgemoe opens it.

    Args:
        model: What to write.
        directory: An existing empty directory, best a staged one.
        source: Checkpoint to copy tokenizer and licence files from; `model.path` by default.
        provenance: How the model was made; `model.provenance` by default.

    Raises:
        OutputError: The disk refuses (full, read-only).
    """
    set_expert_counts(model)
    save_pretrained(model.model, directory, _stored_tensors(model))
    _save_notes(
        model,
        directory,
        model.experts_per_layer,
        dict(provenance if provenance is not None else model.provenance or {}),
        source or model.path,
        [ranks_of(layer) for layer in model.layers],
        [layer.basis_rank for layer in model.layers],
        [layer.intermediate_size for layer in model.layers],
    )


def save_settings(
    model: MoeModel,
    directory: Path,
    counts: Sequence[int],
    *,
    source: Path,
    provenance: Mapping[str, Any],
    ranks: Sequence[Ranks | None] | None = None,
    bases: Sequence[int | None] | None = None,
    widths: Sequence[int] | None = None,
) -> None:
    """Write what `save_model` writes, but for the weights.

    Args:
        model: The model, possibly on the meta device; its configuration is changed.
        directory: An existing directory.
        counts: Experts that each MoE layer has in the weights.
        source: Checkpoint to copy tokenizer and licence files from.
        provenance: How the model was made.
        ranks: Ranks of each MoE layer in the weights, None for one of whole experts; those that
            its layers have by default.
        bases: Rank of the bases that each MoE layer's experts share in the weights, None for a
            layer without; those that its layers have by default.
        widths: Intermediate channels of the experts of each MoE layer in the weights; those
            that its layers have by default.
    """
    set_expert_counts(model, counts)
    config: Any = model.config
    config.architectures = [type(model.model).__name__]
    config.save_pretrained(str(directory))
    if model.model.generation_config is not None:
        file = directory / "generation_config.json"
        model.model.generation_config.to_json_file(str(file))
    found = [ranks_of(layer) for layer in model.layers] if ranks is None else ranks
    based = [layer.basis_rank for layer in model.layers] if bases is None else bases
    wide = [layer.intermediate_size for layer in model.layers] if widths is None else widths
    _save_notes(model, directory, counts, dict(provenance), source, found, based, wide)


def _save_notes(
    model: MoeModel,
    directory: Path,
    counts: Sequence[int],
    provenance: dict[str, Any],
    source: Path | None,
    ranks: Sequence[Ranks | None],
    bases: Sequence[int | None],
    widths: Sequence[int],
) -> None:
    entries, told = width_entries(model, widths)
    factored = any(rank is not None for rank in ranks)
    based = any(rank is not None for rank in bases)
    ragged = len(set(counts)) > 1 or factored or based or not told
    note: dict[str, Any] = {"provenance": provenance} if provenance else {}
    if ragged:
        note["experts_per_layer"] = list(counts)
    if factored:
        note["ranks_per_layer"] = [rank and [rank.up, rank.down] for rank in ranks]
    if based:
        note["basis_per_layer"] = list(bases)
    if not told:
        note["widths_per_layer"] = list(widths)
    _complete_config(
        directory / "config.json",
        model.config,
        model.stored_dtype,
        model=model,
        note=note,
        entries=entries,
    )
    save_k_policy(model.k_policy, directory)
    if ragged:
        RaggedNote(
            moe_layers=tuple(layer.index for layer in model.layers),
            experts_per_layer=tuple(counts),
            provenance=provenance,
            ranks_per_layer=tuple(ranks) if factored else None,
            basis_per_layer=tuple(bases) if based else None,
            widths_per_layer=None if told else tuple(widths),
        ).save(directory)
    if source is not None:
        copy_companions(source, directory)


def save_plain(
    model: PreTrainedModel, directory: Path, types: Mapping[str, torch.dtype]
) -> None:
    """Write a transformers model, each tensor in a type of its own.

    Args:
        model: What to write.
        directory: An existing directory, best a staged one.
        types: Floating types of its tensors by name; others stay in theirs.

    Raises:
        OutputError: The disk refuses (full, read-only).
    """
    state = model.state_dict()
    tensors = _cast(state, {name: types[name] for name in types if name in state})
    sizes: dict[torch.dtype, int] = {}
    for tensor in {_memory(tensor): tensor for tensor in tensors.values()}.values():
        if tensor.is_floating_point():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    save_pretrained(model, directory, tensors)
    _complete_config(directory / "config.json", model.config, max(sizes, key=sizes.__getitem__))


def save_pretrained(
    model: PreTrainedModel, directory: Path, tensors: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Write configuration and weights of a transformers model.

    Args:
        model: What to write.
        directory: An existing directory, best a staged one.
        tensors: What to write in place of its state dict.

    Raises:
        OutputError: The disk refuses (full, read-only).
    """
    state = None if tensors is None else dict(tensors)
    own = model.generation_config
    # transformers reads generation settings that it refuses to write again.
    model.generation_config = None if own is None else GenerationConfig()
    try:
        with quiet_transformers():
            model.save_pretrained(str(directory), state_dict=state)
        if own is not None:
            own.to_json_file(str(directory / "generation_config.json"))
    except SafetensorError as error:
        full = describe_full(error)
        if full is None:
            raise
        raise OutputError(
            f"{directory} could not be written: {full}. Free space or choose another -o."
        ) from error
    finally:
        model.generation_config = own
    mode = (directory / "config.json").stat().st_mode
    for file in directory.glob("*.safetensors"):
        # The library writes them for the owner alone; the rest follows the umask.
        file.chmod(mode)


def set_expert_counts(model: MoeModel, counts: Sequence[int] | None = None) -> None:
    """Make the configuration say how many experts there are.

    A configuration holds one number: of a ragged model it is the largest, so that stock
    transformers refuses the smaller layers instead of misreading them.

    Args:
        model: Any model.
        counts: Experts of each of its MoE layers; those that it has by default.
    """
    most = max(counts or model.experts_per_layer)
    for name in model.count_entries:
        setattr(model.config, name, most)
    if hasattr(model.model, "num_experts"):
        model.model.num_experts = most


def float32_names(model: MoeModel) -> set[str]:
    """Name the tensors that are written in float32, whatever type the others have.

    A choice bias is one where no checkpoint says otherwise: it breaks ties of close scores.

    Args:
        model: Any model.

    Returns:
        Names in the model.
    """
    return {
        name
        for layer in model.layers
        if layer.spec.routing.tensors is not None
        for name in [f"{layer.name}.{layer.spec.routing.tensors.correction_bias}"]
        if name not in model.stored_types
    }


def types_to_write(model: MoeModel) -> dict[str, torch.dtype]:
    """Return the floating type that each tensor is written in: the one it was stored in.

    Args:
        model: Any model, in memory.

    Returns:
        Types of the floating tensors by name in the model; what the checkpoint did not have is
        written in the type of most of it.
    """
    tensors = {n: t for n, t in model.model.state_dict().items() if t.is_floating_point()}
    exact = float32_names(model)
    # Of tied tensors a checkpoint has one.
    tied = {_memory(tensors[n]): t for n, t in model.stored_types.items() if n in tensors}
    return {
        name: model.stored_types.get(name)
        or tied.get(_memory(tensor))
        or (torch.float32 if name in exact else model.stored_dtype)
        for name, tensor in tensors.items()
    }


def _memory(tensor: torch.Tensor) -> tuple[int, torch.Size]:
    return tensor.data_ptr(), tensor.shape


def _stored_tensors(model: MoeModel) -> dict[str, torch.Tensor]:
    return _cast(model.model.state_dict(), types_to_write(model))


def _cast(
    state: Mapping[str, torch.Tensor], types: Mapping[str, torch.dtype]
) -> dict[str, torch.Tensor]:
    # Tied tensors are recognised by their memory, so a cast must not part them.
    cast: dict[tuple[int, torch.Size], torch.Tensor] = {}
    return {
        name: cast.setdefault(_memory(tensor), tensor.to(types[name]))
        if name in types
        else cast.get(_memory(tensor), tensor)
        for name, tensor in state.items()
    }


def _complete_config(
    file: Path,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    *,
    model: MoeModel | None = None,
    note: Mapping[str, Any] | None = None,
    entries: Mapping[str, int] | None = None,
) -> None:
    written = parse_strict(read_file(file), infinities=True)
    written.update(entries or {})
    written["dtype"] = str(dtype).removeprefix("torch.")
    for name in ("edgemoe", *NOTE_ENTRIES):
        written.pop(name, None)
    source, counts = (model.config_entries, model.count_entries) if model else ({}, ())
    complete_entries(written, config, source, counts)
    if note:
        written["edgemoe"] = dict(note)
    text = json.dumps(written, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    file.write_text(text, encoding="utf-8")
