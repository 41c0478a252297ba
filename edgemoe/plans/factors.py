"""How a plan's experts become products of thinner matrices, with the tokens that this takes.

A plan that is applied has nothing but the checkpoint beside it. Methods that look at what flows
through the layers therefore find their tokens in the plan itself, compressed.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from edgemoe.calibrate.sample import Window
from edgemoe.errors import PlanError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from edgemoe.plans.plan_json import PlanReader

_TOKEN = np.dtype("<i4")
_REMEDY = "Make the plan again with `edgemoe decompose`."


@dataclass(frozen=True, kw_only=True)
class EmbeddedSample:
    """Windows of tokens as text.

    Compressed text is kept as it is, since another zlib may compress the same tokens otherwise
    and a plan must not change when it is read and written.

    Attributes:
        windows: Tokens of each window, in [1, inf).
        ids: All token ids one after the other, int32 in little-endian order, compressed by
            zlib, in base64.
    """

    windows: tuple[int, ...]
    ids: str

    def __post_init__(self) -> None:
        if not self.windows or any(length < 1 for length in self.windows):
            raise PlanError(
                "windows must be one or more numbers of tokens in [1, inf), got "
                f"{list(self.windows)!r:.80}. {_REMEDY}"
            )
        if any(token < 0 for token in self.tokens.tolist()):
            raise PlanError(f"ids must be token ids in [0, inf), got a negative one. {_REMEDY}")

    @classmethod
    def of(cls, windows: Sequence[Window]) -> EmbeddedSample:
        """Embed windows.

        Args:
            windows: One or more of them; of which line they are is forgotten.

        Returns:
            The sample.
        """
        ids = np.array([token for window in windows for token in window.ids], _TOKEN)
        text = base64.b64encode(zlib.compress(ids.tobytes(), 9)).decode("ascii")
        return cls(windows=tuple(len(window.ids) for window in windows), ids=text)

    @property
    def tokens(self) -> NDArray[np.int32]:
        """All token ids, int32 [tokens].

        Raises:
            PlanError: The text is not what it should be.
        """
        size = sum(self.windows) * _TOKEN.itemsize
        try:
            packed = base64.b64decode(self.ids.encode("ascii"), validate=True)
            expanding = zlib.decompressobj()
            # No more than is wanted: a few bytes may stand for gigabytes.
            data = expanding.decompress(packed, size + 1)
        except (UnicodeEncodeError, binascii.Error, zlib.error) as error:
            raise PlanError(
                f"ids must be zlib data in base64, got: {error}. {_REMEDY}"
            ) from error
        if len(data) != size:
            raise PlanError(
                f"ids must hold the {sum(self.windows)} tokens of the windows, got "
                f"{'more' if len(data) > size else len(data) // _TOKEN.itemsize}. {_REMEDY}"
            )
        return np.frombuffer(data, _TOKEN).astype(np.int32)

    def to_windows(self) -> list[Window]:
        """Return the windows; their lines are numbered from 1 on."""
        ids = self.tokens
        ends = np.cumsum(self.windows)
        return [
            Window(line=line, start=0, ids=ids[end - length : end].tolist())
            for line, (length, end) in enumerate(zip(self.windows, ends, strict=True), start=1)
        ]

    @property
    def sha256(self) -> str:
        """Hash of the tokens and of where windows end."""
        found = hashlib.sha256(np.array(self.windows, "<i8").tobytes())
        found.update(self.tokens.astype(_TOKEN).tobytes())
        return found.hexdigest()


# The method whose ranks are those of a layer's bases, the same for each of its experts.
SHARED_BASIS = "shared-basis"


@dataclass(frozen=True, kw_only=True)
class Factors:
    """Ranks and method by which a plan's experts are factored.

    Attributes:
        method: Name of the decomposition.
        options: What was asked for and the options of the method; JSON values.
        task: Task whose tokens or sums were read.
        statistics_sha256: Hash of the statistics that they are from.
        edgemoe_version: Version of edgemoe that decided.
        sample: Tokens that the method runs layers on; None for one that reads weights alone.
    """

    method: str
    options: dict[str, Any] = field(default_factory=dict)
    task: str | None = None
    statistics_sha256: str | None = None
    edgemoe_version: str | None = None
    sample: EmbeddedSample | None = None

    @property
    def shares_bases(self) -> bool:
        """Whether the experts of a layer share bases instead of having factors each."""
        return self.method == SHARED_BASIS

    def describe(self) -> dict[str, Any]:
        """Return how experts were factored as JSON values, without the tokens.

        Returns:
            JSON values, for the provenance of a checkpoint.
        """
        return {
            "method": self.method,
            "options": dict(sorted(self.options.items())),
            "task": self.task,
            "statistics_sha256": self.statistics_sha256,
            "edgemoe_version": self.edgemoe_version,
            "sample_tokens": 0 if self.sample is None else sum(self.sample.windows),
            "sample_sha256": None if self.sample is None else self.sample.sha256,
        }

    def to_json(self) -> dict[str, Any]:
        """Return all entries as JSON values."""
        sample = self.sample
        return {
            "method": self.method,
            "options": self.options,
            "task": self.task,
            "statistics_sha256": self.statistics_sha256,
            "edgemoe_version": self.edgemoe_version,
            "sample": sample and {"windows": list(sample.windows), "ids": sample.ids},
        }

    @classmethod
    def from_json(cls, reader: PlanReader) -> Factors:
        """Read what `to_json` returned.

        Args:
            reader: The JSON object.

        Returns:
            The factors.

        Raises:
            PlanError: An entry is missing, unknown, or breaks a rule.
        """
        sample = None
        tokens = reader.optional_object("sample")
        if tokens is not None:
            sample = tokens.build(
                EmbeddedSample, windows=tokens.integers("windows"), ids=tokens.string("ids")
            )
            tokens.finish()
        found = reader.build(
            cls,
            method=reader.string("method"),
            options=reader.mapping("options"),
            task=reader.optional_string("task"),
            statistics_sha256=reader.optional_string("statistics_sha256"),
            edgemoe_version=reader.optional_string("edgemoe_version"),
            sample=sample,
        )
        reader.finish()
        return found
