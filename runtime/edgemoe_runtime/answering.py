"""What an open session answers: texts, chats, choices and likelihoods."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Literal, overload

from edgemoe_runtime.arguments import check_count, check_text
from edgemoe_runtime.chat import TEMPLATE_FILE, ChatTemplate
from edgemoe_runtime.errors import RequestError, SessionClosedError
from edgemoe_runtime.requests import make_prompt, make_request

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from edgemoe_runtime.bundle.manifest import Manifest
    from edgemoe_runtime.decoding.answers import Classification, Generation, Score
    from edgemoe_runtime.decoding.generation import TextStream
    from edgemoe_runtime.decoding.sampling import FloatArray
    from edgemoe_runtime.opening import OpenedTask
    from edgemoe_runtime.service import Service


class Answering:
    """The requests of a session; `Session` opens and closes it.

    Attributes:
        bundle: directory of the bundle.
        manifest: what the bundle holds.
    """

    bundle: Path
    manifest: Manifest
    _opened: OpenedTask
    _service: Service
    _closed: bool
    _template: ChatTemplate | None

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
        return self._generate(
            self.encode(prompt),
            begin,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            stop=stop,
            stream=stream,
        )

    def chat(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        variables: Mapping[str, object] | None = None,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        stream: bool = False,
    ) -> Generation | TextStream:
        """Answer a chat, written as a prompt by the bundle's chat template.

        The prompt and its tokens are those of `apply_chat_template` in transformers 5.24. Needs
        the extra `chat` (jinja2).

        Args:
            messages: mappings with `role` and `content`, in order.
            tools: JSON schemas of functions that the model may call.
            variables: what else the template reads, such as `{"enable_thinking": False}`.
            max_new_tokens: as in `generate`, and so are those below.
            temperature: as there.
            top_p: as there.
            top_k: as there.
            seed: as there.
            stop: as there.
            stream: as there.

        Returns:
            As `generate` returns.

        Raises:
            RequestError: when an argument is out of range, the bundle has no template, the
                template refuses the messages, or jinja2 is not installed.
            BundleError: when the template is malformed.
            SessionClosedError: when the session is closed.
            BackendError: when the engine fails.
        """
        self._check_open()
        begin = time.perf_counter()
        prompt = self._chat_template().render(messages, tools=tools, variables=variables)
        # a template writes the special tokens itself
        ids = self._opened.tokenizer.encode(
            check_text("messages", prompt), special_tokens=False
        )
        return self._generate(
            ids,
            begin,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            stop=stop,
            stream=stream,
        )

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
        begin = time.perf_counter()
        prompt, found = make_prompt(text, choices, template, by)
        return self._service.classify(prompt, found, by, begin)

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
        check_text("prompt", prompt)
        check_text("completion", completion)
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
        given = [check_count(f"ids[{place}]", id_, 0) for place, id_ in enumerate(ids)]
        return self._service.token_logprobs(given, check_count("start", start, 1))

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a prompt, as `generate` runs them.

        Args:
            text: the prompt.

        Returns:
            Token ids with the special tokens that the tokenizer adds; of an empty text the
            token that begins a document, where the model has one.

        Raises:
            RequestError: when it is no valid text.
        """
        ids = self._opened.tokenizer.encode(check_text("prompt", text))
        begin = self.manifest.model.bos_token_id
        return [begin] if not ids and begin is not None else ids

    def _generate(
        self, ids: Sequence[int], begin: float, *, stream: bool, **arguments: object
    ) -> Generation | TextStream:
        """Continue tokens, with the arguments of `generate`, which are checked here."""
        request = make_request(
            ids,
            self._opened.tokenizer,
            self.manifest.model.eos_token_ids,
            stream=stream,
            **arguments,
        )
        serve = self._service.stream if stream else self._service.generate
        return serve(request, begin, self._check_open)

    def _chat_template(self) -> ChatTemplate:
        if self._template is None:
            self._template = ChatTemplate.load(self.bundle)
        if self._template is None:
            raise RequestError(
                f"A chat needs a template, got none in {self.bundle}. Export the bundle from a"
                f" checkpoint that has {TEMPLATE_FILE}, or write the prompt yourself and call"
                " generate."
            )
        return self._template

    def _check_open(self) -> None:
        if self._closed:
            raise SessionClosedError("A session must be open to answer. Open it again.")
