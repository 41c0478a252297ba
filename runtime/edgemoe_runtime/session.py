"""A session: one task of one bundle, opened on the best engine that works here."""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from edgemoe_runtime.adaptive_k.adaptation import AdaptationConfig
from edgemoe_runtime.adaptive_k.limits import Limits
from edgemoe_runtime.answering import Answering
from edgemoe_runtime.arguments import (
    check_count,
    check_flag,
    check_text,
    check_texts,
    check_threads,
)
from edgemoe_runtime.device.sensors import read_sensors
from edgemoe_runtime.errors import RequestError
from edgemoe_runtime.explanation import Explanation, describe
from edgemoe_runtime.messages import quote
from edgemoe_runtime.opening import OpenedTask, open_task
from edgemoe_runtime.service import Service

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType


class Session(Answering):
    """One task of one bundle, ready to answer. Open it with `Session.open`.

    A session has one key-value cache and answers one request at a time, from one thread. Its
    moves along the k ladder and its fall-backs go to the logger `edgemoe_runtime`. It is a
    context manager that closes itself.

    Attributes:
        bundle: directory of the bundle.
        manifest: what the bundle holds.
        task: name of the task.
        deadline_ms: wall-clock time that a request should take at most, or None.
    """

    def __init__(self, opened: OpenedTask) -> None:
        """Take over a task that `open_task` has made ready."""
        self.bundle = opened.bundle
        self.manifest = opened.manifest
        self.task = opened.task
        self.deadline_ms = opened.adaptation.deadline_ms
        self._opened = opened
        self._closed = False
        self._template = None
        begin = time.perf_counter()
        try:
            self._service = Service(opened)
        except BaseException:
            opened.engine.close()
            raise
        self._load_seconds = opened.load_seconds + time.perf_counter() - begin

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        task: str | None = None,
        *,
        deadline_ms: float | None = None,
        token_ms: float | None = None,
        adapt: bool | None = None,
        limits: Limits | None = None,
        sensors_root: str | os.PathLike[str] = "/",
        backend: str | None = None,
        providers: Sequence[str] | None = None,
        threads: int | None = None,
        k_cap: int | Sequence[int] | None = None,
        max_length: int | None = None,
        verify: bool = True,
    ) -> Session:
        """Check a bundle and open one of its tasks.

        Args:
            path: directory of the bundle.
            task: name of the task; may be left out where the bundle has one.
            deadline_ms: wall-clock time in milliseconds that a request should take at most,
                for all of `max_new_tokens`, above 0. The session moves down the bundle's k
                ladder to keep it, reports it when no rung can, and cuts nothing short.
            token_ms: the same for one new token, in milliseconds, above 0.
            adapt: whether to move along the k ladder; None moves where one of the two times
                or limits are given. A session that moves reads the machine's sensors once a
                second, and goes down while it throttles, is hot or lacks power or memory.
            limits: thresholds and waiting times of the moves; None for `Limits()`.
            sensors_root: root of the file system that the sensors are read from.
            backend: `onnxruntime`, `tensorrt` or `tensorrt_rtx`; None tries what the
                bundle's target allows, best first.
            providers: onnxruntime execution providers to try, by full name or as `cpu`,
                `cuda`, `tensorrt`, `tensorrt-rtx`.
            threads: CPU threads within an operator, in [1, 256]; None takes the physical
                cores, or those that this process may use where they are fewer.
            k_cap: experts per token at most, in [1, top_k]: one number, or one per MoE
                layer, which then stays; None for the full k, or what the ladder says.
            max_length: tokens of prompt and answer together at most, in [1, the model's
                limit]; None for that limit, but at most 4096.
            verify: whether to compare the digests of the files. Paths, sizes, external data
                and graph inputs are checked in any case.

        Returns:
            The session; close it, or use it as a context manager.

        Raises:
            ManifestError: when the manifest is missing or malformed.
            IntegrityError: when a file is missing, altered or unsafe.
            BundleError: when it holds no tokenizer that can be loaded.
            RequestError: when an argument is out of range.
            BackendError: when no engine works here; the message gives every reason.
        """
        _check_settings(path, task, backend, providers, verify=verify, adapt=adapt)
        if max_length is not None:
            check_count("max_length", max_length, 1)
        wished = (deadline_ms, token_ms, limits)
        adapts = any(wish is not None for wish in wished) if adapt is None else adapt
        root = Path(sensors_root)
        adaptation = AdaptationConfig(
            deadline_ms=deadline_ms,
            token_ms=token_ms,
            limits=limits or Limits(),
            read=partial(read_sensors, root) if adapts else None,
        )
        return cls(
            open_task(
                Path(path),
                task,
                adaptation=adaptation,
                adapts=adapts,
                backend=backend,
                providers=providers,
                threads=check_threads(threads),
                k_cap=k_cap,
                max_length=max_length,
                verify=verify,
            )
        )

    def set_k_cap(self, k_cap: int | Sequence[int] | None) -> None:
        """Fix the cap of experts per token for the requests that follow.

        Args:
            k_cap: experts per token at most, in [1, top_k]: one number, or one per MoE layer;
                None gives it back to the ladder, or to the full k where the session does not
                adapt.

        Raises:
            RequestError: when it is outside [1, top_k] or has a wrong number of values.
            SessionClosedError: when the session is closed.
        """
        self._check_open()
        self._service.state.use_k_cap(k_cap)

    def explain(self) -> Explanation:
        """Report which engine runs, what was tried before, and how deadlines were kept.

        Returns:
            A record that prints as text, and as JSON by `to_dict`; also of a closed session.
        """
        return describe(self._opened, self._service.state, self._load_seconds)

    def close(self) -> None:
        """Free the engine; calling it twice is allowed."""
        if not self._closed:
            self._closed = True
            self._opened.engine.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _check_settings(
    path: object,
    task: object,
    backend: object,
    providers: object,
    *,
    verify: object,
    adapt: object,
) -> None:
    """Refuse settings of another type."""
    if not isinstance(path, (str, os.PathLike)):
        raise RequestError(f"path must be a str or a path, got {quote(path, 80)}.")
    for name, value in (("task", task), ("backend", backend)):
        if value is not None:
            check_text(name, value)
    if providers is not None:
        check_texts("providers", providers)
    check_flag("verify", verify)
    if adapt is not None:
        check_flag("adapt", adapt)
