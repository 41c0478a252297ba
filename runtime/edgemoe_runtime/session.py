"""A session: one task of one bundle, opened on the best engine that works here."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal, overload

from edgemoe_runtime.answers import Classification, Generation, Score, meets_deadline
from edgemoe_runtime.decoder import Decoder
from edgemoe_runtime.errors import RequestError, SessionClosedError
from edgemoe_runtime.explanation import Explanation
from edgemoe_runtime.generation import (
    GenerationProgress,
    GenerationRequest,
    TextStream,
    generate_pieces,
)
from edgemoe_runtime.k_cap import check_k_cap, ladder_position
from edgemoe_runtime.opening import OpenedTask, open_task
from edgemoe_runtime.sampling import FloatArray, Sampling
from edgemoe_runtime.scoring import score_completions
from edgemoe_runtime.stopping import check_stop

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence
    from types import TracebackType


DEFAULT_TEMPLATE = "{text}\nAnswer: "


class Session:
    """One task of one bundle, ready to answer. Open it with `Session.open`.

    A session has one key-value cache and answers one request at a time, from one thread.
    """

    def __init__(self, opened: OpenedTask) -> None:
        """Take over what `open_task` has made ready."""
        self.bundle = opened.bundle
        self.manifest = opened.manifest
        self.task = opened.task
        self.deadline_ms = opened.deadline_ms
        self._opened = opened
        self._closed = False
        self._tokenizer = opened.tokenizer
        self._k_cap = opened.k_cap
        self._decoder = Decoder(
            opened.backend,
            opened.k_cap,
            top_k=opened.manifest.tasks[opened.task].top_k,
            max_length=opened.max_length,
            vocab_size=opened.manifest.model.vocab_size,
        )
        self._turn = 0
        self._requests = 0
        self._deadlines_met = 0
        self._last_seconds: float | None = None

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        task: str | None = None,
        *,
        deadline_ms: float | None = None,
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
            task: which task; may be left out where the bundle has one.
            deadline_ms: wall-clock time that a request should take at most. It is measured
                and reported; nothing is cut short.
            backend: `onnxruntime`, `tensorrt` or `tensorrt_rtx`; None tries what the
                bundle's target allows, best first.
            providers: onnxruntime execution providers to try, by full name or as `cpu`,
                `cuda`, `tensorrt`, `tensorrt-rtx`.
            threads: CPU threads within an operator; None takes the physical cores, or those
                that this process may use where they are fewer.
            k_cap: experts per token at most, in [1, top_k]: one number, or one per MoE
                layer; None for the full k.
            max_length: tokens of prompt and answer together at most; None for the model's
                limit, but at most 4096.
            verify: whether to compare the digests of the files. Paths, sizes, external data
                and graph inputs are checked in any case.

        Raises:
            ManifestError: when the manifest is missing or malformed.
            IntegrityError: when a file is missing, altered or unsafe.
            RequestError: when an argument is out of range.
            BackendError: when no engine works here; the message gives every reason.
        """
        return cls(
            open_task(
                Path(path),
                task,
                deadline_ms=deadline_ms,
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
            max_new_tokens: most tokens to make.
            temperature: 0 for the most likely token each time; else how much chance.
            top_p: with temperature: smallest set of tokens with this probability, (0, 1].
            top_k: with temperature: only the k most likely tokens.
            seed: of the random choice; the same seed gives the same text on one engine.
            stop: strings that end the text; they are not part of it.
            stream: return an iterator of text pieces instead of the whole answer.

        Raises:
            RequestError: when an argument is out of range or the prompt is too long.
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
        self._decoder.check(request.prompt)
        turn = self._next_turn()
        k_cap = self._k_cap

        def check_turn() -> None:
            self._check_open()
            if self._turn != turn:
                raise RequestError(
                    "A stream must be read to its end before the session takes another"
                    " request. Open a second session to run two at once."
                )

        def finish(progress: GenerationProgress) -> Generation:
            self._count(progress.seconds)
            return Generation(
                text=progress.text,
                tokens=tuple(progress.tokens),
                prompt_tokens=len(request.prompt),
                new_tokens=len(progress.tokens),
                seconds=progress.seconds,
                prefill_seconds=progress.prefill_seconds,
                experts_per_token=progress.experts_per_token,
                k_cap=k_cap,
                backend=self._opened.backend.name,
                fallbacks=self._opened.fallbacks,
                finish_reason=progress.finish_reason,
                deadline_ms=self.deadline_ms,
            )

        progress = GenerationProgress(tokens=[])
        pieces = generate_pieces(request, self._decoder, self._tokenizer, progress, check_turn)
        answer = TextStream(pieces, progress, finish)
        progress.seconds = time.perf_counter() - begin
        if stream:
            return answer
        for _ in answer:
            pass
        return answer.generation

    def classify(
        self,
        text: str,
        choices: Sequence[str],
        *,
        template: str | None = None,
        by: Literal["total", "token", "character"] = "total",
    ) -> Classification:
        """Choose the choice that is the most likely continuation.

        The prompt runs once; every choice then continues it from the same cache.

        Args:
            text: what to classify.
            choices: at least one, distinct, not empty.
            template: prompt around the text, with `{text}` in it; a choice follows it
                directly. None takes "{text}", a new line, "Answer:" and a space.
            by: compare log-likelihoods in total, per token or per character.

        Returns:
            The chosen string, with scores.

        Raises:
            RequestError: when an argument is out of range or the prompt is too long.
            BackendError: when the engine fails.
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
        scores = self._score_all(pattern.replace("{text}", text), choices)
        values = {
            "total": [score.log_likelihood for score in scores],
            "token": [score.per_token for score in scores],
            "character": [score.per_character for score in scores],
        }[by]
        seconds = time.perf_counter() - begin
        self._count(seconds)
        return Classification(
            choices, scores, values, seconds=seconds, deadline_ms=self.deadline_ms
        )

    def score(self, prompt: str, completion: str) -> Score:
        """Return how likely a completion is after a prompt.

        Prompt and completion are tokenised together, as `edgemoe evaluate` does it: white
        space at the prompt's end counts to the completion.

        Raises:
            RequestError: when the completion is empty or both are too long.
            BackendError: when the engine fails.
        """
        self._check_open()
        begin = time.perf_counter()
        score = self._score_all(prompt, [completion])[0]
        self._count(time.perf_counter() - begin)
        return score

    def token_logprobs(self, ids: Sequence[int], start: int) -> FloatArray:
        """Return log p(ids[t] | ids[:t]) for t = start .. len(ids) - 1.

        Args:
            ids: token ids, at most max_length + 1: the last one is scored but never run.
            start: first token to score, in [1, len(ids)].

        Returns:
            float64 ``[len(ids) - start]``.

        Raises:
            RequestError: when an argument is out of range.
            BackendError: when the engine fails.
        """
        self._check_open()
        self._next_turn()
        return self._decoder.token_logprobs(ids, start)

    def set_k_cap(self, k_cap: int | Sequence[int] | None) -> None:
        """Change the cap of experts per token for the requests that follow.

        Raises:
            RequestError: when it is outside [1, top_k] or has a wrong number of values.
        """
        self._check_open()
        layers = len(self.manifest.model.moe_layers)
        self._k_cap = check_k_cap(k_cap, top_k=self._top_k, layers=layers)
        self._next_turn()
        self._decoder.use_k_cap(self._k_cap)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a prompt, as `generate` runs them."""
        ids = self._tokenizer.encode(text)
        begin = self.manifest.model.bos_token_id
        return [begin] if not ids and begin is not None else ids

    def explain(self) -> Explanation:
        """Tell which engine runs, what was tried before, and how deadlines were kept."""
        return Explanation(
            bundle=str(self.bundle),
            task=self.task,
            model=self.manifest.model.name,
            target=self.manifest.target,
            precision=self.manifest.precision,
            backend=self._opened.backend.name,
            fallbacks=self._opened.fallbacks,
            k_cap=self._k_cap,
            ladder_position=ladder_position(self.manifest, self._k_cap),
            top_k=self._top_k,
            experts_per_token=self._decoder.experts_per_token,
            threads=self._opened.threads,
            max_length=self._opened.max_length,
            kv_cache=self.manifest.kv_cache.form,
            load_seconds=self._opened.load_seconds,
            verified=self._opened.verified,
            requests=self._requests,
            last_seconds=self._last_seconds,
            deadline_ms=self.deadline_ms,
            deadlines_met=self._deadlines_met,
        )

    def close(self) -> None:
        """Free the engine; calling it twice is allowed."""
        if not self._closed:
            self._closed = True
            self._opened.backend.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def _top_k(self) -> int:
        return self.manifest.tasks[self.task].top_k

    def _score_all(self, prompt: str, completions: Sequence[str]) -> list[Score]:
        self._next_turn()
        return score_completions(self._decoder, self._tokenizer, prompt, completions)

    def _next_turn(self) -> int:
        self._turn += 1
        return self._turn

    def _count(self, seconds: float) -> None:
        self._requests += 1
        self._last_seconds = seconds
        self._deadlines_met += meets_deadline(seconds, self.deadline_ms) is True

    def _check_open(self) -> None:
        if self._closed:
            raise SessionClosedError("A session must be open to answer. Open it again.")
