"""Open checkpoints, and refuse the unsafe and the broken before any weight is read.

A command opens a `Checkpoint` once and hands it on: configuration, structure, tokenizer and
hashes are read when they are first asked for, and each file of settings once. The functions
take its path as well, for whoever asks one thing.
"""

from __future__ import annotations

import copy
import hashlib
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from edgemoe.errors import FamilyError
from edgemoe.models.adapter import adapt_model
from edgemoe.models.config.configuration import Configuration, check_family, read_configuration
from edgemoe.models.config.remarks import remark_once, remarks
from edgemoe.models.config.tokenizer_file import open_tokenizer
from edgemoe.models.discovery import build_skeleton, discover
from edgemoe.models.experts import is_experts_module
from edgemoe.models.gguf.reading import open_gguf
from edgemoe.models.k_policy import FILE_NAME as K_POLICY
from edgemoe.models.k_policy import put_k_policy, read_k_policy
from edgemoe.models.loading import (
    GENERATION_FILE,
    check_fit,
    quiet_transformers,
    read_generation_settings,
    refusing_misfits,
    settle_weights,
    stored_dtype,
)
from edgemoe.models.quantised.notes import QuantisationNote, find_quantisation_note
from edgemoe.models.quantised.reading import QuantisedWeights, plain_settings
from edgemoe.models.ragged import FILE_NAME as RAGGED_NOTE
from edgemoe.models.ragged import make_ragged_class, read_ragged_note, resize_layers
from edgemoe.models.safety import check_directory, check_weights, read_json_object, read_small
from edgemoe.models.streaming import Skeleton
from edgemoe.models.weights.conversion import Conversion
from edgemoe.models.weights.fingerprint import FileHashes, hash_file
from edgemoe.models.weights.left_out import LeftOut, judge_left_out
from edgemoe.models.weights.tensor_files import find_quantised, list_tensors
from edgemoe.models.weights.ties import tell_ties, untie_what_differs

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedConfig, PreTrainedModel

    from edgemoe.k_policy import KPolicy
    from edgemoe.models.contract import MoeModel
    from edgemoe.models.discovery import ModelSpec
    from edgemoe.models.gguf.reading import GgufModel
    from edgemoe.models.ragged import RaggedNote
    from edgemoe.models.registry import Family
    from edgemoe.models.shapes import ModelShape

_CONFIG = "config.json"


class Checkpoint:
    """A checkpoint that is open, a directory or a GGUF file; nothing is read twice.

    What it hands out belongs to whoever asked and may be changed, but for `structure`, `spec`
    and `tokenizer`, which are the same objects each time.

    Attributes:
        path: The directory.
    """

    def __init__(self, path: Path) -> None:
        """Open a directory; nothing of it is read yet.

        Args:
            path: The directory.

        Raises:
            CheckpointError: It is missing, a file, or a bundle.
        """
        check_directory(path)
        self.path = path
        self._contents: dict[str, bytes | None] = {}
        self._left_out: tuple[LeftOut, ...] | None = None
        # Of all its views: filled once the weights' headers are read.
        self._stored_types: dict[str, torch.dtype] = {}

    @classmethod
    def open(cls, path: Path | str | Checkpoint) -> Checkpoint:
        """Open a checkpoint, unless that was done.

        Args:
            path: Its directory, or the open checkpoint, which is returned.

        Returns:
            The checkpoint.

        Raises:
            CheckpointError: It is missing, a file, or a bundle.
        """
        return path if isinstance(path, Checkpoint) else cls(Path(path))

    def read(self, name: str) -> bytes | None:
        """Read a small file.

        Args:
            name: Its name.

        Returns:
            Its content; None where there is no such file.
        """
        if self.gguf is not None:
            return self.gguf.read(name)
        if name not in self._contents:
            file = self.path / name
            self._contents[name] = read_small(file) if file.exists() else None
        return self._contents[name]

    @cached_property
    def gguf(self) -> GgufModel | None:
        """The GGUF model that it is; None where it is a Hugging Face directory."""
        return open_gguf(self.path)

    @cached_property
    def configuration(self) -> Configuration:
        """What its config.json says, of whatever family transformers knows."""
        content = read_json_object(self.path / _CONFIG, self.read(_CONFIG))
        plain = plain_settings(self.path, content, self.quantisation_note)
        return read_configuration(self.path / _CONFIG, plain)

    @cached_property
    def quantisation_note(self) -> QuantisationNote | None:
        """What announces that its weights are quantised; None where nothing does."""
        content = read_json_object(self.path / _CONFIG, self.read(_CONFIG))
        return find_quantisation_note(content, self.read)

    @cached_property
    def quantised(self) -> QuantisedWeights | None:
        """Its weights where they are quantised and edgemoe reads their form, None elsewhere."""
        if self.gguf is not None or self.quantisation_note is None:
            return None
        return find_quantised(self.weights)

    @cached_property
    def family(self) -> Family:
        """Its family; `FamilyError` where that is not supported."""
        content = read_json_object(self.path / _CONFIG, self.read(_CONFIG))
        check_family(content)
        return self.configuration.family

    @property
    def wrapper(self) -> str | None:
        """Model type of the whole where the language model is a part of it, None elsewhere."""
        found = self.configuration
        return None if found.whole is found.text else str(found.whole.model_type)

    @property
    def config(self) -> PreTrainedConfig:
        """A copy of its language model's configuration: models change theirs."""
        return copy.deepcopy(self.configuration.text)

    @cached_property
    def note(self) -> RaggedNote | None:
        """What `edgemoe.json` says; None where there is none."""
        return read_ragged_note(self.path, self.read(RAGGED_NOTE))

    @property
    def k_policy(self) -> KPolicy | None:
        """How many experts each token uses; None where it is always top_k."""
        return read_k_policy(self.path, self.read(K_POLICY))

    @cached_property
    def weights(self) -> list[Path]:
        """Its weight files, checked: `CheckpointError` where they are unsafe or not whole."""
        return check_weights(self.path)

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """What its weights hold that the language model has no place for.

        Raises:
            CheckpointError: The model cannot be right without it, or weights are quantised.
        """
        if self._left_out is None:
            self._left_out = self._match(self.structure.model)
        return self._left_out

    def check_left_out(
        self, skeleton: Skeleton | None = None, model: PreTrainedModel | None = None
    ) -> None:
        """Refuse weights that hold what the model needs and has no place for; remark the rest.

        Args:
            skeleton: The model, matched with the weights, where that was done.
            model: A model without experts that the weights are for, on the meta device.

        Raises:
            CheckpointError: As `left_out`.
        """
        if self._left_out is None and skeleton is not None:
            self._left_out = self._judge(skeleton.model, skeleton.conversion)
        elif self._left_out is None and model is not None:
            self._left_out = self._match(model)
        for remark in remarks(self.configuration.dropped, self.left_out):
            remark_once(self.path, remark)

    def _match(self, model: PreTrainedModel) -> tuple[LeftOut, ...]:
        is_whole = model.config.model_type == self.configuration.whole.model_type
        with refusing_misfits(self.path):
            conversion = Conversion(
                model, list_tensors(self.weights), None if is_whole else self.wrapper
            )
        return self._judge(model, conversion)

    def _judge(self, model: PreTrainedModel, conversion: Conversion) -> tuple[LeftOut, ...]:
        note = self.quantisation_note
        found = judge_left_out(model, conversion, self.path, note)
        if self.gguf is None:
            self._stored_types.update(conversion.stored_types())
        if self.quantised is not None:
            remark_once(self.path, self.quantised.remark)
        elif note is not None:
            remark_once(self.path, f"its weights are plain numbers, in spite of {note}")
        return found

    @property
    def spec(self) -> ModelSpec:
        """How its MoE layers are built."""
        with refusing_misfits(self.path):
            return discover(self.family, self.config)

    @cached_property
    def structure(self) -> MoeModel:
        """A view of the model on the meta device; weights are not loaded."""
        family, spec, note = self.family, self.spec, self.note
        with refusing_misfits(self.path):
            skeleton = build_skeleton(family, self.config)
            if note is not None:
                resize_layers(skeleton, spec, note)
            found = adapt_model(skeleton, spec=spec)
        found.stored_types = self._stored_types
        put_k_policy(found, self.k_policy)
        return found

    @property
    def shape(self) -> ModelShape:
        """How many experts each layer has; weights are not loaded."""
        return self.structure.shape

    @property
    def max_length(self) -> int:
        """Most tokens that the model was built for."""
        config = self.configuration.text
        return int(getattr(config, "max_position_embeddings", None) or 2**31)

    @cached_property
    def has_experts(self) -> bool:
        """Whether its configuration makes layers with experts, of a supported family."""
        try:
            with refusing_misfits(self.path), quiet_transformers():
                skeleton = build_skeleton(self.family, self.config)
        except FamilyError:
            return False
        return any(is_experts_module(module) for module in skeleton.modules())

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Its tokenizer, without truncation or padding."""
        return open_tokenizer(self.path)

    @cached_property
    def tokenizer_sha256(self) -> str:
        """SHA-256 of tokenizer.json, in hexadecimal."""
        if self.gguf is not None:
            return hashlib.sha256(self.read("tokenizer.json") or b"").hexdigest()
        return hash_file(self.path / "tokenizer.json")

    @cached_property
    def hashes(self) -> FileHashes:
        """Those of the files that define it, as far as they are known."""
        return FileHashes(self.path, self.weights, self.read)

    @property
    def sha256(self) -> str:
        """Its fingerprint; weights are read, but once."""
        return self.hashes.fingerprint()

    def stamps(self) -> dict[str, list[int]]:
        """Return size in bytes and time of change in nanoseconds of each file, by name."""
        return self.hashes.stamps()

    @property
    def model_class(self) -> type[Any]:
        """The class that its weights fit into; `family.causal_lm` is what runs."""
        base = self.family.causal_lm
        return (
            base if self.note is None else make_ragged_class(self.family, self.note, self.spec)
        )

    def adapt(self, model: PreTrainedModel, stored_dtype: torch.dtype) -> MoeModel:
        """View a model with this checkpoint's weights as the kit does.

        Args:
            model: The model.
            stored_dtype: Floating type that its weights are stored in.

        Returns:
            The view.
        """
        model.__class__ = self.family.causal_lm
        found = adapt_model(model, self.path, stored_dtype, self.spec)
        found.hashes, found.config_entries = self.hashes, self.configuration.entries
        found.stored_types = self._stored_types
        put_k_policy(found, self.k_policy)
        return found


def load_model(path: Path | Checkpoint, dtype: torch.dtype = torch.float32) -> MoeModel:
    """Load a checkpoint.

    Args:
        path: The checkpoint.
        dtype: Floating type to hold the weights in.

    Returns:
        The model, in eval mode, without gradients.

    Raises:
        FamilyError: The family is not supported; found before weights are looked at.
        CheckpointError: The checkpoint is missing, a pickle, truncated or inconsistent.
    """
    checkpoint = Checkpoint.open(path)
    # What is refused without a look at the weights comes first.
    _, config, _ = checkpoint.family, checkpoint.config, checkpoint.note
    files = checkpoint.weights
    model_class = checkpoint.model_class
    checkpoint.check_left_out()
    if checkpoint.wrapper is not None or checkpoint.gguf or checkpoint.quantised:
        # transformers knows the names of the whole only where it builds the whole, and does not
        # read what is quantised tensor by tensor.
        with refusing_misfits(checkpoint.path):
            skeleton = Skeleton(model_class, config, files, dtype, wrapper=checkpoint.wrapper)
            untie_what_differs(skeleton.model, skeleton.conversion)
            skeleton.load_all()
        read_generation_settings(
            skeleton.model,
            checkpoint.path,
            None if checkpoint.gguf is None else checkpoint.read(GENERATION_FILE),
        )
        return checkpoint.adapt(skeleton.model, stored_dtype(config) or skeleton.stored_dtype)
    with refusing_misfits(checkpoint.path), quiet_transformers():
        model, report = model_class.from_pretrained(
            str(checkpoint.path),
            config=config,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    check_fit(report, checkpoint.path)
    settle_weights(model, list_tensors(files))
    tell_ties(model)
    return checkpoint.adapt(model, stored_dtype(config) or dtype)


def read_shape(path: Path | Checkpoint) -> ModelShape:
    """Read how many experts each layer of a checkpoint has; weights are not loaded.

    Args:
        path: The checkpoint.

    Returns:
        The shape.

    Raises:
        FamilyError: The family is not supported.
        CheckpointError: The directory or its configuration is missing or malformed.
    """
    return Checkpoint.open(path).shape


def load_tokenizer(path: Path | Checkpoint) -> Tokenizer:
    """Open the tokenizer of a checkpoint, with the library that the runtime uses.

    Args:
        path: The checkpoint.

    Returns:
        The tokenizer, without truncation or padding.

    Raises:
        CheckpointError: tokenizer.json is missing or malformed.
    """
    return Checkpoint.open(path).tokenizer
