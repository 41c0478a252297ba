"""The generation loop, which yields text piece by piece."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np

from edgemoe_runtime.decoding.sampling import Sampling, choose_token
from edgemoe_runtime.decoding.stopping import StopFilter, TokenStops
from edgemoe_runtime.decoding.tokenizer import Detokenizer, Tokenizer
from edgemoe_runtime.errors import RequestError

if TYPE_CHECKING:
    from edgemoe_runtime.adaptive_k.adaptation import KMove
    from edgemoe_runtime.adaptive_k.k_controller import KController
    from edgemoe_runtime.decoding.answers import Generation
    from edgemoe_runtime.decoding.decoder import Decoder
    from edgemoe_runtime.fallback import Fallback


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """A prompt, with limits and sampling.

    Attributes:
        prompt: token ids, at least one.
        max_new_tokens: most tokens to generate, at least 1.
        sampling: how tokens are chosen.
        seed: of the random generator; None takes a new one.
        stop: strings that end the text.
        stop_tokens: sequences of tokens that end it: stop strings with special tokens.
        eos_token_ids: tokens that end the text.
        needs_margin: whether to sum up the margins of the most likely tokens.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling
    seed: int | None
    stop: tuple[str, ...]
    eos_token_ids: frozenset[int]
    needs_margin: bool = False
    stop_tokens: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        most = cast("object", self.max_new_tokens)
        if not isinstance(most, int) or most < 1:
            raise RequestError(f"max_new_tokens must be a whole number >= 1, got {most!r}.")
        if self.seed is not None and self.seed < 0:
            raise RequestError(f"seed must be None or >= 0, got {self.seed}.")


@dataclass(kw_only=True)
class GenerationProgress:
    """Progress of the loop so far; the seconds do not count time outside the loop.

    The margin is that of the most likely token over the second, in nats, summed over new
    tokens. State of the controller is that at the latest token: the decoder may serve another
    request before this one is reported.
    """

    tokens: list[int]
    text: str = ""
    finish_reason: str = "length"
    seconds: float = 0.0
    prefill_seconds: float = 0.0
    experts_per_token: float = 0.0
    margin_sum: float = 0.0
    k_cap: tuple[int, ...] = ()
    k_moves: tuple[KMove, ...] = ()
    late_tokens: int = 0
    fallbacks: tuple[Fallback, ...] = ()

    def record(self, decoder: Decoder, controller: KController) -> None:
        """Record the state of decoder and controller."""
        self.experts_per_token = decoder.experts_per_token
        self.k_cap = controller.rung.k_cap
        self.k_moves = tuple(controller.request_moves)
        self.late_tokens = controller.late_tokens
        self.fallbacks = controller.fallbacks


class TextStream(Iterator[str]):
    """An iterator of the pieces of a text as they become final; joined they are the whole.

    Pieces end at whole characters. A session has one cache, so a stream ends with an error
    when the session takes another request before the stream is exhausted.
    """

    def __init__(
        self,
        pieces: Iterator[str],
        progress: GenerationProgress,
        finish: Callable[[GenerationProgress], Generation],
    ) -> None:
        self._pieces = pieces
        self._progress = progress
        self._finish = finish
        self._generation: Generation | None = None
        self._failed = False

    def __iter__(self) -> TextStream:
        return self

    def __next__(self) -> str:
        if self._generation is not None or self._failed:
            raise StopIteration
        begin = time.perf_counter()
        try:
            piece = next(self._pieces, None)
        except BaseException:
            # a part is no answer
            self._failed = True
            raise
        finally:
            self._progress.seconds += time.perf_counter() - begin
        if piece is None:
            self._generation = self._finish(self._progress)
            raise StopIteration
        self._progress.text += piece
        return piece

    @property
    def generation(self) -> Generation:
        """The whole answer, once the stream is exhausted.

        Raises:
            RequestError: when the stream is not exhausted.
        """
        if self._generation is None:
            raise RequestError("A stream must be exhausted before its generation is known.")
        return self._generation


def generate_pieces(
    request: GenerationRequest,
    decoder: Decoder,
    tokenizer: Tokenizer,
    progress: GenerationProgress,
    check_claim: Callable[[], None],
    controller: KController,
) -> Iterator[str]:
    """Yield the pieces of a text that are not empty.

    Args:
        request: prompt, limits and sampling.
        decoder: runs the tokens.
        tokenizer: turns them into text.
        progress: is filled along the way.
        check_claim: raises when the decoder's cache belongs to another request by now.
        controller: chooses the rung of the k ladder, of this request from now on.
    """
    generator = np.random.default_rng(request.seed)
    text, stop = Detokenizer(tokenizer, request.prompt), StopFilter(request.stop)
    special = TokenStops(request.stop_tokens)
    check_claim()
    controller.begin(progress.seconds)
    # the first new token comes out of the prompt
    most = min(request.max_new_tokens, decoder.max_length - len(request.prompt) + 1)
    controller.before_prompt(len(request.prompt), most - 1)
    begin = time.perf_counter()
    logits = decoder.prefill(request.prompt)
    progress.prefill_seconds = time.perf_counter() - begin
    controller.after_prompt(len(request.prompt), progress.prefill_seconds)
    while True:
        progress.record(decoder, controller)
        if request.needs_margin:
            second, best = np.partition(logits, -2)[-2:].tolist()
            progress.margin_sum += best - second
        token = choose_token(logits, request.sampling, generator)
        progress.tokens.append(token)
        if token in request.eos_token_ids:
            progress.finish_reason = "eos"
            break
        piece = "".join(stop.push(text.push(passed)) for passed in special.push(token))
        if piece:
            controller.pause()
            yield piece
            controller.resume()
        if stop.stopped or special.stopped:
            break
        if len(progress.tokens) >= request.max_new_tokens:
            break
        if not decoder.free:
            progress.finish_reason = "max_length"
            break
        check_claim()
        controller.before_step(most - len(progress.tokens))
        begin = time.perf_counter()
        logits = decoder.step(token)
        controller.after_step(time.perf_counter() - begin)
    rest = "".join(stop.push(text.push(passed)) for passed in special.flush())
    rest += stop.push(text.flush())
    if stop.stopped or special.stopped:
        progress.finish_reason = "stop"
    if not stop.stopped:
        rest += stop.flush()
    if rest:
        yield rest
