"""A session: one task of one bundle, opened on the best engine that works here."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, overload

from edgemoe_runtime.adaptive_k.adaptation import AdaptationConfig
from edgemoe_runtime.adaptive_k.limits import Limits
from edgemoe_runtime.decoding.generation import GenerationRequest, TextStream
from edgemoe_runtime.decoding.sampling import FloatArray, Sampling
from edgemoe_runtime.decoding.stopping import check_stop
from edgemoe_runtime.device.sensors import read_sensors
from edgemoe_runtime.errors import RequestError, SessionClosedError
from edgemoe_runtime.explanation import Explanation, describe
from edgemoe_runtime.opening import OpenedTask, open_task
from edgemoe_runtime.service import Service

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence
    from types import TracebackType

    from edgemoe_runtime.decoding.answers import Classification, Generation, Score


DEFAULT_TEMPLATE = "{text}\nAnswer: "


class Session:
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
            threads: CPU threads within an operator, above 0; None takes the physical cores, or
                those that this process may use where they are fewer.
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
                threads=threads,
                k_cap=k_cap,
                max_length=max_length,
                verify=verify,
            )
        )

    @overload
    def generate(
        self,
        prompt: str,
        *,
        max_new_tokens: int = ...,
        temperature: float = ...,
        top_p: float = ...,
        top_k: int | None = ...,
        seed: int | None = ...,
        stop: str | Sequence[str] | None = ...,
        stream: Literal[False] = ...,
    ) -> Generation: ...

    @overload
    def generate(
        self,
        prompt: str,
        *,
        max_new_tokens: int = ...,
        temperature: float = ...,
        top_p: float = ...,
        top_k: int | None = ...,
        seed: int | None = ...,
        stop: str | Sequence[str] | None = ...,
        stream: Literal[True],
    ) -> TextStream: ...

    @overload
    def generate(
        self,
        prompt: str,
        *,
        max_new_tokens: int = ...,
        temperature: float = ...,
        top_p: float = ...,
        top_k: int | None = ...,
        seed: int | None = ...,
        stop: str | Sequence[str] | None = ...,
        stream: bool,
    ) -> Generation | TextStream: ...

    def generate(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        stream: bool = False,
    ) -> Generation | TextStream:
        """Continue a prompt.

        Args:
            prompt: the text as it is; no chat template is applied.
            max_new_tokens: most tokens to generate, >= 1.
            temperature: divisor of the logits before sampling, >= 0; 0 takes the most likely
                token each time.
            top_p: with temperature: sample from the smallest set of tokens with at least this
                cumulative probability, in (0, 1].
            top_k: with temperature: sample from the k most likely tokens, >= 1; None for all.
            seed: of the random generator, >= 0; the same seed gives the same text on one
                engine. None takes a new one.
            stop: strings that end the text; they are not part of it.
            stream: return an iterator of text pieces instead of the whole answer.

        Returns:
            The answer; with `stream`, an iterator of the pieces of its text, whose
            `generation` is the answer once it is exhausted.

        Raises:
            RequestError: when an argument is out of range or the prompt is too long.
            SessionClosedError: when the session is closed.
            BackendError: when the engine fails.
        """
        self._check_open()
        begin = time.perf_counter()
        request = GenerationRequest(
            prompt=tuple(self.encode(prompt)),
            max_new_tokens=max_new_tokens,
            sampling=Sampling(temperature=temperature, top_k=top_k, top_p=top_p),
            seed=seed,
            stop=check_stop(stop),
            eos_token_ids=frozenset(self.manifest.model.eos_token_ids),
        )
        if stream:
            return self._service.stream(request, begin, self._check_open)
        return self._service.generate(request, begin, self._check_open)

    def classify(
        self,
        text: str,
        choices: Sequence[str],
        *,
        template: str | None = None,
        by: Literal["total", "token", "character"] = "total",
    ) -> Classification:
        """Return the choice that is the most likely continuation of a prompt.

        The prompt runs once; every choice then continues it from the same cache.

        Args:
            text: text to classify.
            choices: at least one string, distinct, none empty.
            template: prompt around the text, with `{text}` in it; a choice follows it
                directly. None takes "{text}", a new line, "Answer:" and a space.
            by: compare log-likelihoods in `total`, per `token` or per `character`.

        Returns:
            The chosen string, with the scores of all.

        Raises:
            RequestError: when an argument is out of range or the prompt is too long.
            BackendError: when the engine fails.
            SessionClosedError: when the session is closed.
        """
        self._check_open()
        distinct = not isinstance(choices, str) and len(set(choices)) == len(choices) > 0
        if not distinct or "" in choices:
            raise RequestError(
                f"choices must be a list of distinct, non-empty strings, got {choices!r}."
            )
        if by not in ("total", "token", "character"):
            raise RequestError(f"by must be total, token or character, got {by!r}.")
        pattern = DEFAULT_TEMPLATE if template is None else template
        if "{text}" not in pattern:
            raise RequestError(f"template must contain {{text}}, got {pattern!r}.")
        begin = time.perf_counter()
        return self._service.classify(pattern.replace("{text}", text), choices, by, begin)

    def score(self, prompt: str, completion: str) -> Score:
        """Return the log-likelihood of a completion after a prompt.

        Prompt and completion are tokenised together, as `edgemoe evaluate` does it: white
        space at the prompt's end counts to the completion.

        Args:
            prompt: text before the completion.
            completion: text to score, at least one token.

        Returns:
            Natural log-likelihood, with the numbers of tokens and characters.

        Raises:
            RequestError: when the completion is empty or both are too long.
            BackendError: when the engine fails.
            SessionClosedError: when the session is closed.
        """
        self._check_open()
        return self._service.score(prompt, completion, time.perf_counter())

    def token_logprobs(self, ids: Sequence[int], start: int) -> FloatArray:
        """Return log p(ids[t] | ids[:t]) for t = start .. len(ids) - 1, at the full k.

        Args:
            ids: token ids, at most max_length + 1: the last one is scored but never run.
            start: first token to score, in [1, len(ids)].

        Returns:
            float64 `[len(ids) - start]`, natural logarithms.

        Raises:
            RequestError: when an argument is out of range.
            BackendError: when the engine fails.
            SessionClosedError: when the session is closed.
        """
        self._check_open()
        return self._service.token_logprobs(ids, start)

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

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a prompt, as `generate` runs them.

        Args:
            text: the prompt.

        Returns:
            Token ids with the special tokens that the tokenizer adds; of an empty text the
            token that begins a document, where the model has one.
        """
        ids = self._opened.tokenizer.encode(text)
        begin = self.manifest.model.bos_token_id
        return [begin] if not ids and begin is not None else ids

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

    def _check_open(self) -> None:
        if self._closed:
            raise SessionClosedError("A session must be open to answer. Open it again.")
