"""The tokens that a calibration read, kept in the statistics.

Sums tell most methods enough. Those that search or train (how far is a layer's output from
what it was, without these experts?) must run layers again, on the tokens that were measured.
So statistics keep them, four bytes each, with the lines that they are from: whoever has the
statistics file can read the calibration text. `TokenSample.without_tokens` leaves them out. The
lines' digests stay then: they tell, later, whether a score is of lines that calibration read,
and whoever can guess a line can see that it was one of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray

_COLUMNS = 4


@dataclass(frozen=True, kw_only=True)
class Window:
    """Tokens of one forward pass.

    Attributes:
        line: Number of the line that they are from, from 1 on.
        start: Place of the first of them in the line's tokens.
        ids: Token ids.
        digest: `edgemoe.data_provenance.digest_line` of the line.
    """

    line: int
    start: int
    ids: list[int]
    digest: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenSample:
    """Windows of tokens, by rising line and start.

    Attributes:
        ids: The tokens of all windows, int32 [tokens]; none where they were left out.
        table: Line, start, length and digest of each window, int64 [windows, 4].
    """

    ids: NDArray[np.int32]
    table: NDArray[np.int64]

    @classmethod
    def of(cls, windows: Sequence[Window]) -> TokenSample:
        """Keep windows.

        Args:
            windows: What calibration reads, each window once.

        Returns:
            The sample.
        """
        ordered = sorted(windows, key=lambda window: (window.line, window.start))
        rows = [(w.line, w.start, len(w.ids), w.digest) for w in ordered]
        ids = [token for window in ordered for token in window.ids]
        return cls(
            ids=np.array(ids, np.int32),
            table=np.array(rows, np.int64).reshape(-1, _COLUMNS),
        )

    @classmethod
    def union(cls, samples: Iterable[TokenSample]) -> TokenSample:
        """Put samples of different lines of one file together.

        Args:
            samples: The samples.

        Returns:
            All their windows.
        """
        parts = list(samples)
        if all(sample.has_tokens for sample in parts):
            return cls.of([window for sample in parts for window in sample.windows])
        table = np.concatenate([sample.table for sample in parts])
        order = np.lexsort((table[:, 1], table[:, 0]))
        return cls(ids=np.zeros(0, np.int32), table=table[order])

    @property
    def has_tokens(self) -> bool:
        """Whether the tokens are there, not only where they were."""
        return len(self.ids) == int(self.table[:, 2].sum())

    def without_tokens(self) -> TokenSample:
        """Leave out the tokens, and with them the text.

        Returns:
            The same windows, of which only line, place, length and digest are known.
        """
        return TokenSample(ids=np.zeros(0, np.int32), table=self.table)

    @property
    def windows(self) -> list[Window]:
        """The windows."""
        ends = np.cumsum(self.table[:, 2])
        return [
            Window(
                line=int(line),
                start=int(start),
                ids=self.ids[end - length : end].tolist(),
                digest=int(digest),
            )
            for (line, start, length, digest), end in zip(self.table, ends, strict=True)
        ]

    @property
    def digests(self) -> frozenset[int]:
        """Digests of the lines."""
        return frozenset(self.table[:, 3].tolist())

    def to_arrays(self) -> dict[str, NDArray[np.int32] | NDArray[np.int64]]:
        """Return what the sample is, to be stored.

        Returns:
            Arrays by name.
        """
        return {"ids": self.ids, "windows": self.table}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[np.generic]]) -> TokenSample:
        """Put a sample together from what `to_arrays` returned.

        Args:
            arrays: Arrays by name.

        Returns:
            The sample.

        Raises:
            ValueError: They are not what a sample is made of.
        """
        ids, table = arrays["ids"], arrays["windows"]
        if ids.dtype != np.int32 or ids.ndim != 1:
            raise ValueError(f"ids must be int32 [tokens], got {ids.dtype}{list(ids.shape)}")
        if table.dtype != np.int64 or table.shape != (len(table), _COLUMNS):
            raise ValueError(
                f"windows must be int64 [windows, {_COLUMNS}], got "
                f"{table.dtype}{list(table.shape)}"
            )
        lengths = table.astype(np.int64)[:, 2]
        if (lengths < 1).any() or lengths.sum() != len(ids) > 0:
            raise ValueError(
                f"windows must have {len(ids)} tokens between them, got {lengths.sum()}"
            )
        return cls(ids=ids.astype(np.int32), table=table.astype(np.int64))
