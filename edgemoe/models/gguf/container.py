"""Read the header of a GGUF file: its metadata, and where its tensors lie.

The package `gguf` names the types and dequantises. Its `GGUFReader` is not used for files that
somebody else made: a length beyond the file's end makes it loop over what is not there
(gguf 0.19), and it keeps an array for each word of the vocabulary. Here each length is compared
with what is left of the file before it is believed.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field
from functools import cached_property
from typing import IO, TYPE_CHECKING, Any

from edgemoe.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MOST_DIMENSIONS = 4
_MOST_NAME_BYTES = 1 << 16
# A header lists a vocabulary and the tensors: that of the largest models is 30 MB.
_MOST_HEADER_BYTES = 1 << 29
_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q",
    12: "<d",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Block:
    """A tensor of a GGUF file as it is stored.

    Attributes:
        name: Its name there.
        file: The file.
        type_name: ggml's name of its type, such as `Q4_K`.
        type_id: ggml's number of its type.
        shape: Its shape in torch's order: the last dimension is contiguous.
        begin: Its first byte, counted from the file's start.
        nbytes: Its size in bytes.
    """

    name: str
    file: Path
    type_name: str
    type_id: int
    shape: tuple[int, ...]
    begin: int
    nbytes: int


@dataclass(kw_only=True)
class Container:
    """The header of a GGUF model, of all its files.

    Attributes:
        files: The files.
        metadata: Values by key; of a split model those of the first file.
        blocks: Its tensors by name.
    """

    files: tuple[Path, ...]
    metadata: dict[str, Any]
    blocks: dict[str, Block] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """The first file, as messages name it."""
        return self.files[0]

    @cached_property
    def architecture(self) -> str:
        """llama.cpp's name of the model's architecture."""
        found = self.metadata.get("general.architecture")
        if not isinstance(found, str):
            raise CheckpointError(
                f"{self.path} must say general.architecture, got {found!r:.50}. It is no GGUF "
                "of a language model."
            )
        return found


def read_container(files: Sequence[Path]) -> Container:
    """Read the headers of a GGUF model.

    Args:
        files: Its files, as `find_gguf` returns them.

    Returns:
        The header; no weight is read.

    Raises:
        CheckpointError: A file is not GGUF, cut short, or contradicts itself.
    """
    made: Container | None = None
    for file in files:
        try:
            with file.open("rb") as stream:
                metadata, blocks = _Header(stream, file).read()
        except OSError as error:
            raise CheckpointError(
                f"{file} must be readable, got {error}. Check the path."
            ) from error
        if made is None:
            made = Container(files=tuple(files), metadata=metadata)
        for block in blocks:
            if block.name in made.blocks:
                raise CheckpointError(
                    f"{file} must hold each tensor once, got {block.name!r:.100} again. "
                    "Download it again."
                )
            made.blocks[block.name] = block
    if made is None:
        raise ValueError("a GGUF model must have a file.")
    _check_split(made)
    return made


def _check_split(container: Container) -> None:
    count = container.metadata.get("split.count", 1)
    tensors = container.metadata.get("split.tensors.count", len(container.blocks))
    if count not in (0, len(container.files)) or tensors != len(container.blocks):
        raise CheckpointError(
            f"{container.path} must be whole, got {len(container.files)} of {count} files and "
            f"{len(container.blocks)} of {tensors} tensors. Copy all parts into one folder, "
            "under the names that they were made with."
        )


class _Header:
    """The header of one file."""

    def __init__(self, stream: IO[bytes], file: Path) -> None:
        self._stream = stream
        self._file = file
        self._size = file.stat().st_size

    def read(self) -> tuple[dict[str, Any], list[Block]]:
        if self._stream.read(4) != _MAGIC:
            raise self._broken("that does not begin with GGUF")
        version = self._number("<I")
        if version not in _VERSIONS:
            raise self._broken(
                f"of version {version} (read are {_VERSIONS} in little-endian order)"
            )
        tensors, keys = self._number("<Q"), self._number("<Q")
        # The shortest entries: a name's length, a type and a value; a name's length, a number
        # of dimensions, a type and an offset.
        self._fits(keys, 13, "keys")
        metadata: dict[str, Any] = {}
        for _ in range(keys):
            key = self._name()
            if key in metadata:
                raise self._broken(f"that says {key!r:.100} twice")
            metadata[key] = self._value(self._number("<I"))
        self._fits(tensors, 24, "tensors")
        found = [self._tensor() for _ in range(tensors)]
        return metadata, self._place(found, metadata.get("general.alignment", 32))

    def _place(
        self, found: list[tuple[str, tuple[int, ...], int, int]], alignment: Any
    ) -> list[Block]:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise self._broken(f"with the alignment {alignment!r:.30}")
        begin = -(-self._stream.tell() // alignment) * alignment
        blocks = []
        for name, shape, type_id, offset in found:
            try:
                kind = GGMLQuantizationType(type_id)
                elements, size = GGML_QUANT_SIZES[kind]
            except (KeyError, ValueError) as error:
                raise CheckpointError(
                    f"{self._file} must hold tensors of types that gguf knows, got type "
                    f"{type_id} for {name!r:.100}. Update the package gguf, or use a file of "
                    "another quantisation."
                ) from error
            if shape[-1] % elements:
                raise self._broken(f"whose {name!r:.100} has rows of {shape[-1]} {kind.name}")
            nbytes = math.prod(shape) // elements * size
            if offset % alignment or begin + offset + nbytes > self._size:
                raise self._broken(f"without all of {name!r:.100}")
            blocks.append(
                Block(
                    name=name, file=self._file, type_name=kind.name, type_id=type_id,
                    shape=shape, begin=begin + offset, nbytes=nbytes,
                )
            )  # fmt: skip
        return blocks

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._name()
        dimensions = self._number("<I")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise self._broken(f"whose {name!r:.100} has {dimensions} dimensions")
        # ggml names the contiguous dimension first, torch last.
        shape = tuple(self._number("<Q") for _ in range(dimensions))[::-1]
        if not all(0 < size < 1 << 40 for size in shape) or math.prod(shape) > 1 << 50:
            raise self._broken(f"whose {name!r:.100} has the shape {shape}")
        return name, shape, self._number("<I"), self._number("<Q")

    def _value(self, kind: int, depth: int = 0) -> Any:
        if kind == _STRING:
            return self._text(self._number("<Q"))
        if kind == _ARRAY and depth < 2:
            inner, count = self._number("<I"), self._number("<Q")
            if inner in _SCALARS:
                self._fits(count, struct.calcsize(_SCALARS[inner]), "values")
                form = f"<{count}{_SCALARS[inner][1]}"
                return list(struct.unpack(form, self._take(struct.calcsize(form))))
            self._fits(count, 8, "values")
            return [self._value(inner, depth + 1) for _ in range(count)]
        if kind not in _SCALARS:
            raise self._broken(f"with a value of type {kind}")
        return self._number(_SCALARS[kind])

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _name(self) -> str:
        length = self._number("<Q")
        if length > _MOST_NAME_BYTES:
            raise self._broken(f"with a name of {length} bytes")
        found = self._text(length)
        if isinstance(found, bytes):
            raise self._broken(f"with the name {found!r:.100}")
        return found

    def _text(self, length: int) -> str | bytes:
        content = self._take(length)
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError:
            # Vocabularies hold pieces of characters.
            return content

    def _take(self, length: int) -> bytes:
        if length > min(self._size, _MOST_HEADER_BYTES) - self._stream.tell():
            raise self._broken(f"that ends within its header ({self._size} bytes)")
        return self._stream.read(length)

    def _fits(self, count: int, least_bytes: int, what: str) -> None:
        if count * least_bytes > self._size - self._stream.tell():
            raise self._broken(f"of {self._size} bytes that announces {count} {what}")

    def _broken(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self._file} must be a whole GGUF file, got one {what}. Download it again."
        )
