"""The fall-back chain: which engines are tried, in which order, and why each was left."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgemoe_runtime.backends.registry import BACKENDS
from edgemoe_runtime.errors import BackendError, RequestError
from edgemoe_runtime.execution_providers import (
    CPU,
    CUDA,
    PROVIDER_NAMES,
    PROVIDERS,
    TENSORRT,
    TENSORRT_RTX,
)
from edgemoe_runtime.fallback import Fallback

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgemoe_runtime.backends.base import Backend, OpenRequest

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Candidate:
    """An engine to try: a name of `BACKENDS`, and a provider where it is onnxruntime."""

    backend: str
    provider: str | None = None

    @property
    def name(self) -> str:
        """Backend and provider in one word."""
        return self.backend if self.provider is None else f"{self.backend}:{self.provider}"


_ON_CPU = (Candidate("onnxruntime", CPU),)
_ON_CUDA = (Candidate("onnxruntime", CUDA), *_ON_CPU)
_ON_TENSORRT = (
    Candidate("tensorrt"),
    Candidate("onnxruntime", TENSORRT),
    *_ON_CUDA,
)
_ON_TENSORRT_RTX = (
    Candidate("tensorrt_rtx"),
    Candidate("onnxruntime", TENSORRT_RTX),
    *_ON_CUDA,
)
CHAINS: dict[str, tuple[Candidate, ...]] = {
    "cpu": _ON_CPU,
    "cuda": _ON_CUDA,
    "tensorrt": _ON_TENSORRT,
    "tensorrt-rtx": _ON_TENSORRT_RTX,
    "jetson-orin": _ON_TENSORRT,
    "jetson-thor": _ON_TENSORRT,
}


def plan_chain(
    target: str, backend: str | None = None, providers: Sequence[str] | None = None
) -> tuple[Candidate, ...]:
    """Return the engines to try, best first.

    Args:
        target: the bundle's target.
        backend: restricts the chain to one backend.
        providers: onnxruntime providers to try instead, by full or short name.

    Raises:
        RequestError: when a name is unknown, or nothing is left to try.
    """
    if backend is not None and backend not in BACKENDS:
        raise RequestError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}.")
    if providers is not None:
        if isinstance(providers, str) or not providers:
            raise RequestError(
                f"providers must be a list of at least one provider, got {providers!r}."
            )
        if backend not in (None, "onnxruntime"):
            raise RequestError(
                f"providers belong to the backend onnxruntime, got backend {backend!r}. Leave"
                " one of the two out."
            )
        return tuple(Candidate("onnxruntime", _provider(name)) for name in providers)
    chain = CHAINS[target]
    if backend is not None:
        named = tuple(candidate for candidate in chain if candidate.backend == backend)
        return named or (Candidate(backend),)
    return chain


def open_first(
    chain: Sequence[Candidate], request: OpenRequest
) -> tuple[Backend, tuple[Fallback, ...]]:
    """Open the first engine of the chain that works here.

    Returns:
        The backend, and the steps down that led to it.

    Raises:
        BackendError: when none works; the message gives every reason.
    """
    fallbacks: list[Fallback] = []
    for candidate in chain:
        try:
            backend = BACKENDS[candidate.backend](request.with_provider(candidate.provider))
        except BackendError as error:  # noqa: PERF203 (a handful of engines, once)
            fallbacks.append(Fallback(candidate.name, str(error)))
            _LOG.info("%s", fallbacks[-1])
        else:
            return backend, tuple(fallbacks)
    reasons = "".join(f"\n  {fallback}" for fallback in fallbacks)
    raise BackendError(
        f"One engine must work on this machine, tried {len(fallbacks)}:{reasons}\n`edgemoe"
        " doctor` tells what is installed and what is missing."
    )


def _provider(name: str) -> str:
    provider = PROVIDER_NAMES.get(name, name)
    if provider not in PROVIDERS:
        known = ", ".join([*PROVIDER_NAMES, *PROVIDERS])
        raise RequestError(f"providers must be of {known}, got {name!r}.")
    return provider
