"""A GGUF model's tensors under the names of a Hugging Face checkpoint, read one at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from edgemoe.errors import CheckpointError
from edgemoe.models.gguf.decoding import dtype_name, read_values
from edgemoe.models.gguf.rope import TENSORS as ROPE_TENSORS
from edgemoe.models.gguf.rules import LAYER, Rule, Sizes, alone, is_unused
from edgemoe.models.stored_tensors import StoredTensor, as_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from edgemoe.models.gguf.container import Block, Container
    from edgemoe.models.gguf.rules import Build

_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output_norm.bias": "model.norm.bias",
    "output.weight": "lm_head.weight",
    "output.bias": "lm_head.bias",
}


@dataclass(frozen=True, kw_only=True)
class GgufTensor(StoredTensor):
    """One tensor of a Hugging Face checkpoint, made of what a GGUF file stores.

    Attributes:
        parts: Stored tensors, each with the expert that is wanted of it.
        build: Makes the tensor of their contents.
        sizes: What it is made with.
    """

    parts: tuple[tuple[Block, int | None], ...]
    build: Build
    sizes: Sizes

    @property
    def stored_type(self) -> str:
        """Ggml's name of the type that it is stored in, such as `Q4_K`."""
        return self.parts[0][0].type_name

    @property
    def stored_nbytes(self) -> int:
        """Size of its part of the file in bytes."""
        return sum(
            block.nbytes // (1 if index is None else block.shape[0])
            for block, index in self.parts
        )

    def extents(self) -> Iterator[tuple[Path, int]]:
        """Yield each file that it is read from, with the end of its bytes there."""
        for block, _ in self.parts:
            yield block.file, block.begin + block.nbytes

    def read(self, memory: torch.Tensor | None = None) -> torch.Tensor:
        """Read the contents, dequantised.

        Args:
            memory: Where to put them, uint8 [nbytes]; new memory by default.

        Returns:
            A tensor of type `dtype`.

        Raises:
            CheckpointError: The file has become shorter than its header says.
        """
        contents = [_read(block, index).to(self.dtype) for block, index in self.parts]
        made = self.build(contents, self.sizes)
        if memory is None:
            return made.contiguous()
        tensor = memory.view(self.dtype).reshape(self.shape)
        tensor.copy_(made)
        return tensor

    def read_chunks(self) -> Iterator[bytes]:
        """Read the contents as a checkpoint stores them.

        Yields:
            All bytes at once: a tensor is dequantised whole.
        """
        yield bytes(as_bytes(self.read()))


def name_tensors(
    container: Container, rules: Sequence[Rule], layers: int, sizes: Sizes
) -> dict[str, StoredTensor]:
    """Give a model's tensors the names of a Hugging Face checkpoint.

    Args:
        container: The file's header.
        rules: How tensors of a decoder layer are made.
        layers: Decoder layers that the model has; of what follows, nothing is read.
        sizes: What tensors are made with.

    Returns:
        The tensors by name.

    Raises:
        CheckpointError: A stored tensor has no place, or a rule's tensors do not fit together.
    """
    found: dict[str, StoredTensor] = {}
    by_layer: dict[int, dict[str, Block]] = {}
    for name, block in container.blocks.items():
        match = LAYER.fullmatch(name)
        if match is None:
            if name in _OUTER:
                target = _OUTER[name]
                found[target] = _tensor(target, [(block, None)], alone, sizes)
            elif name not in ROPE_TENSORS:
                raise _no_place(container, name)
        elif not is_unused(name, layers):
            by_layer.setdefault(int(match[1]), {})[match[2]] = block
    for layer, blocks in sorted(by_layer.items()):
        used: set[str] = set()
        for rule in rules:
            for target, parts in _match(rule, blocks, used):
                whole = f"model.layers.{layer}.{target}"
                if whole in found:
                    raise _no_place(container, parts[0][0].name)
                found[whole] = _tensor(whole, parts, rule.build, sizes)
        for name in sorted(set(blocks) - used):
            # A scale of 4-bit weights, for one, must not be passed over.
            raise _no_place(container, f"blk.{layer}.{name}")
    return found


def _match(
    rule: Rule, blocks: Mapping[str, Block], used: set[str]
) -> Iterator[tuple[str, list[tuple[Block, int | None]]]]:
    if not rule.is_each:
        if all(source in blocks for source in rule.sources):
            used.update(rule.sources)
            yield rule.target, [(blocks[source], None) for source in rule.sources]
        return
    source = rule.sources[0]
    if "{expert}" not in source:
        if source in blocks:
            used.add(source)
            for expert in range(blocks[source].shape[0]):
                yield rule.target.format(expert=expert), [(blocks[source], expert)]
        return
    expert = 0
    while (name := source.format(expert=expert)) in blocks:
        used.add(name)
        yield rule.target.format(expert=expert), [(blocks[name], None)]
        expert += 1


def _tensor(
    name: str, parts: list[tuple[Block, int | None]], build: Build, sizes: Sizes
) -> GgufTensor:
    block = parts[0][0]
    types = {dtype_name(part) for part, _ in parts}
    dtype = getattr(torch, types.pop()) if len(types) == 1 else torch.float32
    shapes = [part.shape if index is None else part.shape[1:] for part, index in parts]
    shape = shapes[0]
    if build is not alone:
        try:
            metas = [torch.empty(shape, dtype=dtype, device="meta") for shape in shapes]
            shape = tuple(build(metas, sizes).shape)
        except (RuntimeError, IndexError, ValueError) as error:
            raise CheckpointError(
                f"tensors of {block.file} must fit its metadata, got {block.name!r:.100} of "
                f"shape {block.shape}: {error!s:.100}. Download it again."
            ) from error
    made: dict[str, Any] = {
        "name": name,
        "file": block.file,
        "dtype": dtype,
        "shape": shape,
        "begin": block.begin,
    }
    return GgufTensor(**made, parts=tuple(parts), build=build, sizes=sizes)


def _read(block: Block, index: int | None) -> torch.Tensor:
    found = torch.from_numpy(read_values(block, index))
    return found.view(torch.bfloat16) if block.type_name == "BF16" else found


def _no_place(container: Container, name: str) -> CheckpointError:
    return CheckpointError(
        f"each tensor of a GGUF must have a place in the model, got {name!r:.100} in "
        f"{container.path}, which edgemoe's {container.architecture} has none for. Use the "
        "Hugging Face checkpoint that the file was made from."
    )
