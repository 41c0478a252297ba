"""Make one task of a bundle ready: check everything first, then open the best engine."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgemoe_runtime.backends.base import Backend, OpenRequest
from edgemoe_runtime.chain import Fallback, open_first, plan_chain
from edgemoe_runtime.errors import BundleError, RequestError
from edgemoe_runtime.integrity import verify_bundle
from edgemoe_runtime.k_cap import check_k_cap
from edgemoe_runtime.manifest import Manifest
from edgemoe_runtime.tokenizer import TOKENIZER_FILE, Tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

DEFAULT_MAX_LENGTH = 4096


@dataclass(frozen=True, kw_only=True)
class OpenedTask:
    """Everything that a session needs, checked; see `Session.open` for the arguments."""

    bundle: Path
    manifest: Manifest
    task: str
    backend: Backend
    fallbacks: tuple[Fallback, ...]
    tokenizer: Tokenizer
    k_cap: tuple[int, ...]
    max_length: int
    threads: int | None
    deadline_ms: float | None
    verified: bool
    load_seconds: float


def open_task(
    bundle: Path,
    task: str | None,
    *,
    deadline_ms: float | None,
    backend: str | None,
    providers: Sequence[str] | None,
    threads: int | None,
    k_cap: int | Sequence[int] | None,
    max_length: int | None,
    verify: bool,
) -> OpenedTask:
    """Check a bundle and the arguments, then open an engine; see `Session.open`.

    Raises:
        ManifestError: when the manifest is missing or malformed.
        IntegrityError: when a file is missing, altered or unsafe.
        RequestError: when an argument is out of range.
        BackendError: when no engine works here.
    """
    begin = time.perf_counter()
    manifest = Manifest.load(bundle)
    name, entry = manifest.task(task)
    caps = check_k_cap(k_cap, top_k=entry.top_k, layers=len(manifest.model.moe_layers))
    chain = plan_chain(manifest.target, backend, providers)
    _check_positive("deadline_ms", deadline_ms)
    _check_positive("threads", threads)
    length = _check_length(manifest, max_length)
    if TOKENIZER_FILE not in manifest.files:
        raise BundleError(
            f"A bundle must hold {TOKENIZER_FILE} to be run, got none in {bundle}. Export it"
            " again from a checkpoint that has one."
        )
    verify_bundle(bundle, tasks=[name], hashes=verify, manifest=manifest)
    tokenizer = Tokenizer(bundle / TOKENIZER_FILE)
    request = OpenRequest(
        bundle=bundle,
        manifest=manifest,
        task=name,
        max_length=length,
        threads=threads,
        needs_length=max_length is not None,
    )
    opened, fallbacks = open_first(chain, request)
    return OpenedTask(
        bundle=bundle,
        manifest=manifest,
        task=name,
        backend=opened,
        fallbacks=fallbacks,
        tokenizer=tokenizer,
        k_cap=caps,
        max_length=opened.max_length,
        threads=threads,
        deadline_ms=deadline_ms,
        verified=verify,
        load_seconds=time.perf_counter() - begin,
    )


def _check_length(manifest: Manifest, max_length: int | None) -> int:
    limit = manifest.model.max_position_embeddings
    length = min(limit, DEFAULT_MAX_LENGTH) if max_length is None else max_length
    if not 1 <= length <= limit:
        raise RequestError(
            f"max_length must be in [1, {limit}] (the model's max_position_embeddings), got"
            f" {length}."
        )
    return length


def _check_positive(name: str, value: float | None) -> None:
    if value is not None and not value > 0:
        raise RequestError(f"{name} must be above 0, got {value}.")
