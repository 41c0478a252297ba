"""Weights of several graphs in few files: every byte once, graphs read ranges of them.

Tensors arrive one graph at a time and go to one spool file on disk at once, so that only one
graph's weights are in memory. Once all graphs were seen it is known which tasks read what,
and the spool becomes ``shared.onnx.data`` and one ``<task>.onnx.data`` per task: by a rename
where all of it belongs in one file, which is the usual case, and by a copy otherwise.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from edgemoe.errors import OutputError
from edgemoe.staging import require_space
from edgemoe_runtime.bundle.names import SHARED_WEIGHTS_FILE, weights_file

if TYPE_CHECKING:
    from types import TracebackType

    from edgemoe_exporters.bundle.expert_layout import StackLayout
    from edgemoe_exporters.bundle.journal import Contents, WeightJournal

ALIGNMENT_BYTES = 64  # one cache line; onnxruntime maps files and uses the address as it is
_COPY_BYTES = 8 << 20  # 8 MiB


@dataclass(frozen=True)
class Extent:
    """Bytes ``[start, start + length)`` of one segment of the spool."""

    segment: int
    start: int
    length: int


@dataclass(frozen=True)
class Place:
    """Where an extent ended up: bytes ``[offset, offset + length)`` of ``file``."""

    file: str
    offset: int
    length: int


@dataclass
class _Segment:
    spool_offset: int
    length: int
    ranges: dict[str, tuple[int, int]] = field(default_factory=dict)
    slot_digests: list[bytes | None] = field(default_factory=list)

    def use(self, task: str, start: int, length: int) -> None:
        low, high = self.ranges.get(task, (start, start + length))
        self.ranges[task] = (min(low, start), max(high, start + length))


@dataclass(frozen=True)
class _Piece:
    """A run of one segment that goes to one file."""

    segment: int
    start: int
    stop: int
    tasks: frozenset[str]


class WeightSpool:
    """Collects tensors of all tasks; use as a context manager around :meth:`finish`.

    Args:
        directory: Where the files are written.
        journal: What an earlier process wrote there, and what this one writes.
    """

    def __init__(self, directory: Path, journal: WeightJournal) -> None:
        self._directory = directory
        self._path = directory / "weights.spool"
        self._journal = journal
        self._segments: list[_Segment] = []
        self._by_content: dict[tuple[int, bytes], int] = {}
        self._stacks: dict[tuple[str, int], int] = {}
        self._end = 0
        # An earlier process that wrote everything left no spool.
        self._is_finished = journal.has_earlier and not self._path.exists()
        path = Path(os.devnull) if self._is_finished else self._path
        # Closed with this object.
        self._file: BinaryIO = path.open("r+b" if journal.has_earlier else "w+b")

    def __enter__(self) -> WeightSpool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()
        if not self._journal.is_kept:
            self._path.unlink(missing_ok=True)

    def put(self, task: str, name: str, contents: Contents, data: memoryview | None) -> Extent:
        """Store a tensor of ``task``, unless the same bytes are stored already.

        Args:
            task: Whose tensor it is.
            name: Its name.
            contents: What its bytes are.
            data: The bytes, uint8 ``[length]``, at least one; None where an earlier process
                wrote them.

        Returns:
            Where it is in the spool.
        """
        extent = self._put(task, contents, data)
        self._note(task, name, contents, data)
        return extent

    def put_stack(
        self,
        task: str,
        name: str,
        contents: Contents,
        data: memoryview | None,
        layout: StackLayout,
    ) -> tuple[Extent, bool]:
        """Store a tensor whose first axis are the experts of ``task``, in the layout's order.

        Args:
            task: Whose tensor it is.
            name: What makes it the same tensor in another task's graph.
            contents: What its bytes are, in a part for each expert.
            data: The bytes, uint8 ``[length]``; None where an earlier process wrote them.
            layout: How the experts of this layer are stored.

        Returns:
            Where it is, and whether it is in the common stack: it is not where an expert that
            another task stored differs in its bytes, and the whole tensor is stored apart.
        """
        window = layout.windows[task]
        size = contents.length // window.count
        index = self._stacks.get((name, size))
        if index is None:
            index = self._reserve(size * len(layout.slots), data)
            self._stacks[name, size] = index
            self._segments[index].slot_digests = [None] * len(layout.slots)
        segment = self._segments[index]
        slots = segment.slot_digests[window.start : window.stop]
        pairs = list(zip(slots, contents.digests, strict=True))
        if any(old not in (None, new) for old, new in pairs):
            return self.put(task, name, contents, data), False
        for i, (old, _) in enumerate(pairs):
            if old is None and data is not None:
                part = data[i * size : (i + 1) * size]
                self._write(segment.spool_offset + (window.start + i) * size, part)
        segment.slot_digests[window.start : window.stop] = contents.digests
        segment.use(task, window.start * size, contents.length)
        self._note(task, name, contents, data)
        return Extent(index, window.start * size, contents.length), True

    def sync(self) -> None:
        """Let all that was stored reach the disk, where an interrupted export can go on."""
        self._journal.sync(self._file)

    def finish(self) -> Places:
        """Write the final files.

        Returns:
            Where each extent is.

        Raises:
            OutputError: An earlier process wrote them, and they are not what it wrote.
        """
        places = Places(self._pieces(), [segment.spool_offset for segment in self._segments])
        if self._is_finished:
            self._check(places)
            return places
        self._file.flush()
        if places.unmoved and places.sizes:
            (name,) = places.sizes
            self._file.truncate(places.sizes[name])
            self._file.flush()
            self._path.rename(self._directory / name)
        else:
            # The spool stays until its copies are whole.
            require_space(self._directory, sum(places.sizes.values()))
            for name in places.sizes:
                self._copy(name, places)
            self._path.unlink()
        return places

    def _put(self, task: str, contents: Contents, data: memoryview | None) -> Extent:
        index = self._by_content.get(contents.key)
        if index is None:
            index = self._reserve(contents.length, data)
            self._by_content[contents.key] = index
            if data is not None:
                self._write(self._segments[index].spool_offset, data)
        self._segments[index].use(task, 0, contents.length)
        return Extent(index, 0, contents.length)

    def _note(self, task: str, name: str, contents: Contents, data: memoryview | None) -> None:
        if data is not None:
            self._journal.note(task, name, contents, self._file)

    def _check(self, places: Places) -> None:
        for name, size in places.sizes.items():
            path = self._directory / name
            if not path.exists() or path.stat().st_size != size:
                raise OutputError(
                    f"{path} must have the {size} bytes that an interrupted export wrote, got "
                    "others. Pass --force to begin anew."
                )

    def _reserve(self, length: int, data: memoryview | None) -> int:
        if data is not None:
            require_space(self._directory, length)
        offset = _aligned(self._end)
        self._end = offset + length
        self._segments.append(_Segment(spool_offset=offset, length=length))
        return len(self._segments) - 1

    def _write(self, offset: int, data: memoryview) -> None:
        self._file.seek(offset)
        self._file.write(data)

    def _pieces(self) -> list[_Piece]:
        """Cut each segment where no task reads across."""
        pieces: list[_Piece] = []
        for index, segment in enumerate(self._segments):
            open_piece: _Piece | None = None
            for task, (start, stop) in sorted(
                segment.ranges.items(), key=lambda item: (item[1], item[0])
            ):
                if open_piece is not None and start < open_piece.stop:
                    open_piece = _Piece(
                        index,
                        open_piece.start,
                        max(stop, open_piece.stop),
                        open_piece.tasks | {task},
                    )
                    pieces[-1] = open_piece
                else:
                    open_piece = _Piece(index, start, stop, frozenset({task}))
                    pieces.append(open_piece)
        return pieces

    def _copy(self, name: str, places: Places) -> None:
        with (self._directory / name).open("wb") as target:
            for piece, offset in places.pieces_of(name):
                target.seek(offset)
                self._file.seek(self._segments[piece.segment].spool_offset + piece.start)
                left = piece.stop - piece.start
                while left:
                    left -= target.write(self._file.read(min(left, _COPY_BYTES)))
            target.flush()
            os.fsync(target.fileno())


class Places:
    """The final files: their sizes and what is where.

    Attributes:
        sizes: Bytes of each file.
        unmoved: Whether all is in one file, at the offsets of the spool.
    """

    def __init__(self, pieces: list[_Piece], spool_offsets: list[int]) -> None:
        self.sizes: dict[str, int] = {}
        self._placed: list[tuple[_Piece, str, int]] = []
        for piece in pieces:
            (*others, last) = sorted(piece.tasks)
            name = SHARED_WEIGHTS_FILE if others else weights_file(last)
            offset = _aligned(self.sizes.get(name, 0))
            self.sizes[name] = offset + piece.stop - piece.start
            self._placed.append((piece, name, offset))
        self.unmoved = len(self.sizes) == 1 and all(
            offset == spool_offsets[piece.segment] + piece.start
            for piece, _, offset in self._placed
        )
        self._by_segment: dict[int, list[tuple[_Piece, str, int]]] = {}
        for placed in self._placed:
            self._by_segment.setdefault(placed[0].segment, []).append(placed)

    def find(self, extent: Extent) -> Place:
        """Return where an extent is."""
        for piece, name, offset in self._by_segment[extent.segment]:
            if piece.start <= extent.start and extent.start + extent.length <= piece.stop:
                return Place(name, offset + extent.start - piece.start, extent.length)
        raise KeyError(extent)

    def pieces_of(self, name: str) -> list[tuple[_Piece, int]]:
        """Return the pieces of one file with their offsets."""
        return [(piece, offset) for piece, file, offset in self._placed if file == name]


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
