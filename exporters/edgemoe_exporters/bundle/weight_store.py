"""The weights of several graphs in few files: every byte once, graphs read ranges of them.

Tensors arrive one graph at a time and go to one spool file on disk at once, so that only one
graph's weights are in memory. Once all graphs were seen it is known which tasks read what,
and the spool becomes `shared.onnx.data` and one `<task>.onnx.data` per task: by a rename
where all of it belongs in one file, which is the usual case, and by a copy otherwise.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from edgemoe.disk import require_space
from edgemoe.errors import OutputError
from edgemoe_runtime.bundle.names import SHARED_WEIGHTS_FILE, weights_file

if TYPE_CHECKING:
    from types import TracebackType

    from edgemoe_exporters.bundle.expert_layout import StackLayout
    from edgemoe_exporters.bundle.journal import Contents, WeightJournal

ALIGNMENT_BYTES = 64  # one cache line; onnxruntime maps files and uses the address as it is
_COPY_BYTES = 8 << 20  # 8 MiB


@dataclass(frozen=True)
class ByteRange:
    """Bytes `[start, start + length)` of one segment of the spool."""

    segment: int
    start: int
    length: int


@dataclass(frozen=True)
class FileRange:
    """Bytes `[offset, offset + length)` of `file`."""

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
class _Section:
    """A run of one segment that goes to one file."""

    segment: int
    start: int
    stop: int
    tasks: frozenset[str]


class WeightStore:
    """Stores tensors of all tasks; a context manager around `finish`.

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

    def __enter__(self) -> WeightStore:
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

    def put(
        self, task: str, name: str, contents: Contents, data: memoryview | None
    ) -> ByteRange:
        """Store a tensor of `task`, unless the same bytes are stored already.

        Args:
            task: Whose tensor it is.
            name: Its name.
            contents: Length and hashes of its bytes.
            data: The bytes, uint8 `[length]`, at least one; None where an earlier process
                wrote them.

        Returns:
            Where it is in the spool.
        """
        byte_range = self._put(task, contents, data)
        self._note(task, name, contents, data)
        return byte_range

    def put_stack(
        self,
        task: str,
        name: str,
        contents: Contents,
        data: memoryview | None,
        layout: StackLayout,
    ) -> tuple[ByteRange, bool]:
        """Store a tensor whose first axis are the experts of `task`, in the layout's order.

        Args:
            task: Whose tensor it is.
            name: Its name, the same in every task's graph.
            contents: Length and hashes of its bytes, one hash per expert.
            data: The bytes, uint8 `[length]`; None where an earlier process wrote them.
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
        return ByteRange(index, window.start * size, contents.length), True

    def sync(self) -> None:
        """Flush all that was stored to the disk, where the export can be resumed."""
        self._journal.sync(self._file)

    def finish(self) -> FileLayout:
        """Write the final files.

        Returns:
            Where the bytes of each range are.

        Raises:
            OutputError: An earlier process wrote them, and they are not what it wrote.
        """
        files = FileLayout(
            self._sections(), [segment.spool_offset for segment in self._segments]
        )
        if self._is_finished:
            self._check(files)
            return files
        self._file.flush()
        if files.unmoved and files.sizes:
            (name,) = files.sizes
            self._file.truncate(files.sizes[name])
            self._file.flush()
            self._path.rename(self._directory / name)
        else:
            # The spool stays until its copies are whole.
            require_space(self._directory, sum(files.sizes.values()))
            for name in files.sizes:
                self._copy(name, files)
            self._path.unlink()
        return files

    def _put(self, task: str, contents: Contents, data: memoryview | None) -> ByteRange:
        index = self._by_content.get(contents.key)
        if index is None:
            index = self._reserve(contents.length, data)
            self._by_content[contents.key] = index
            if data is not None:
                self._write(self._segments[index].spool_offset, data)
        self._segments[index].use(task, 0, contents.length)
        return ByteRange(index, 0, contents.length)

    def _note(self, task: str, name: str, contents: Contents, data: memoryview | None) -> None:
        if data is not None:
            self._journal.note(task, name, contents, self._file)

    def _check(self, files: FileLayout) -> None:
        for name, size in files.sizes.items():
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

    def _sections(self) -> list[_Section]:
        """Split each segment where no task reads across."""
        sections: list[_Section] = []
        for index, segment in enumerate(self._segments):
            open_section: _Section | None = None
            for task, (start, stop) in sorted(
                segment.ranges.items(), key=lambda item: (item[1], item[0])
            ):
                if open_section is not None and start < open_section.stop:
                    open_section = _Section(
                        index,
                        open_section.start,
                        max(stop, open_section.stop),
                        open_section.tasks | {task},
                    )
                    sections[-1] = open_section
                else:
                    open_section = _Section(index, start, stop, frozenset({task}))
                    sections.append(open_section)
        return sections

    def _copy(self, name: str, files: FileLayout) -> None:
        with (self._directory / name).open("wb") as target:
            for section, offset in files.sections_of(name):
                target.seek(offset)
                self._file.seek(self._segments[section.segment].spool_offset + section.start)
                left = section.stop - section.start
                while left:
                    left -= target.write(self._file.read(min(left, _COPY_BYTES)))
            target.flush()
            os.fsync(target.fileno())


class FileLayout:
    """The final files: their sizes, and where each section is.

    Attributes:
        sizes: Bytes of each file.
        unmoved: Whether all is in one file, at the offsets of the spool.
    """

    def __init__(self, sections: list[_Section], spool_offsets: list[int]) -> None:
        self.sizes: dict[str, int] = {}
        self._placed: list[tuple[_Section, str, int]] = []
        for section in sections:
            (*others, last) = sorted(section.tasks)
            name = SHARED_WEIGHTS_FILE if others else weights_file(last)
            offset = _aligned(self.sizes.get(name, 0))
            self.sizes[name] = offset + section.stop - section.start
            self._placed.append((section, name, offset))
        self.unmoved = len(self.sizes) == 1 and all(
            offset == spool_offsets[section.segment] + section.start
            for section, _, offset in self._placed
        )
        self._by_segment: dict[int, list[tuple[_Section, str, int]]] = {}
        for placed in self._placed:
            self._by_segment.setdefault(placed[0].segment, []).append(placed)

    def find(self, byte_range: ByteRange) -> FileRange:
        """Return where the bytes of a range are."""
        for section, name, offset in self._by_segment[byte_range.segment]:
            stop = byte_range.start + byte_range.length
            if section.start <= byte_range.start and stop <= section.stop:
                start = offset + byte_range.start - section.start
                return FileRange(name, start, byte_range.length)
        raise KeyError(byte_range)

    def sections_of(self, name: str) -> list[tuple[_Section, int]]:
        """Return the sections of one file with their offsets."""
        return [(section, offset) for section, file, offset in self._placed if file == name]


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
