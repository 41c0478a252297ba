"""Make one task of a bundle ready: check everything first, then open the best engine."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgemoe_runtime.adaptive_k.adaptation import AdaptationConfig
from edgemoe_runtime.adaptive_k.k_cap import check_k_cap
from edgemoe_runtime.arguments import check_threads
from edgemoe_runtime.backends.base import OpenRequest
from edgemoe_runtime.backends.chain import plan_chain
from edgemoe_runtime.backends.engine import Engine
from edgemoe_runtime.bundle.integrity import verify_bundle
from edgemoe_runtime.bundle.manifest_file import load_manifest
from edgemoe_runtime.bundle.names import EXPERTS_USED, TOKENIZER_FILE
from edgemoe_runtime.decoding.tokenizer import Tokenizer
from edgemoe_runtime.errors import BundleError, RequestError
from edgemoe_runtime.fallback import Fallback

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from edgemoe_runtime.bundle.manifest import Manifest
    from edgemoe_runtime.bundle.task_entry import TaskEntry

_LOG = logging.getLogger(__name__)
DEFAULT_MAX_LENGTH = 4096


@dataclass(frozen=True, kw_only=True)
class OpenedTask:
    """Everything that a session needs, checked; see `Session.open` for the arguments.

    The fallback table holds fixed caps, by MoE layer, for a graph that should choose k by token
    and cannot.
    """

    bundle: Path
    manifest: Manifest
    task: str
    engine: Engine
    fallbacks: tuple[Fallback, ...]
    tokenizer: Tokenizer
    k_cap: tuple[int, ...] | None
    fallback_table: tuple[int, ...] | None
    adaptation: AdaptationConfig
    adapts: bool
    threads: int | None
    verified: bool
    load_seconds: float


def open_task(
    bundle: Path,
    task: str | None,
    *,
    adaptation: AdaptationConfig | None = None,
    adapts: bool = False,
    backend: str | None = None,
    providers: Sequence[str] | None = None,
    threads: int | None = None,
    k_cap: int | Sequence[int] | None = None,
    max_length: int | None = None,
    verify: bool = True,
) -> OpenedTask:
    """Check a bundle and the arguments, then open an engine; see `Session.open`.

    Raises:
        ManifestError: when the manifest is missing or malformed.
        IntegrityError: when a file is missing, altered or unsafe.
        RequestError: when an argument is out of range.
        BackendError: when no engine works here.
    """
    begin = time.perf_counter()
    manifest = load_manifest(bundle)
    name, entry = manifest.task(task)
    caps = check_k_cap(k_cap, top_k=entry.top_k, layers=len(manifest.model.moe_layers))
    chain = plan_chain(manifest.target, backend, providers)
    adaptation = adaptation or AdaptationConfig()
    threads = check_threads(threads)
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
    engine = Engine(chain, request)
    fallback_table, fallbacks = _find_fallback_table(manifest, entry)
    return OpenedTask(
        bundle=bundle,
        manifest=manifest,
        task=name,
        engine=engine,
        fallbacks=fallbacks,
        tokenizer=tokenizer,
        k_cap=None if k_cap is None else caps,
        fallback_table=fallback_table,
        adaptation=adaptation,
        adapts=adapts,
        threads=threads,
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


def _find_fallback_table(
    manifest: Manifest, entry: TaskEntry
) -> tuple[tuple[int, ...] | None, tuple[Fallback, ...]]:
    """Return the fixed caps that replace a choice of k by token where the graph has none."""
    if entry.k_table is None or any(spec.name == EXPERTS_USED for spec in manifest.outputs):
        return None, ()
    reason = f"the graph has no output {EXPERTS_USED}, so the table of mean k serves"
    _LOG.warning("k policy of %s: %s", entry.graph, reason)
    return entry.k_table, (Fallback("k policy", reason, "allocator"),)
