"""Run one decoder layer of a model as the whole model would.

The model's own forward is called, so masks, rotary tables and what else a layer is given are
its own. Decoder layers before the one that runs answer at once: the last of them with what it
returned before, the others with not-a-number, and the call ends after the layer.

That is right wherever a decoder layer learns of the layers before it only through what the
layer just before returned. Where a family does otherwise, it is noticed: a layer that changes
what it was given (a shared cache, say), or one that is given not-a-number, ends in
`edgemoe.errors.StreamingError`.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import nn

from edgemoe.errors import StreamingError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

# What a decoder layer returns: a tensor, or (nested) tuples of tensors and None.
Outputs: TypeAlias = "torch.Tensor | tuple[Any, ...] | None"

_DEPTH = 6


class _LayerDone(BaseException):
    """The layer has run; no handler in a model may take this for an error of its own."""

    def __init__(self, outputs: Any) -> None:
        super().__init__()
        self.outputs = outputs


@contextlib.contextmanager
def only_layer(
    decoder: nn.Module, layers: nn.ModuleList, index: int
) -> Iterator[Callable[[Mapping[str, Any], Outputs], Outputs]]:
    """Let a model run one of its decoder layers.

    Args:
        decoder: What runs the layers, such as `model.get_decoder()`.
        layers: All decoder layers; the one that runs must have its weights.
        index: Which runs.

    Yields:
        A function from the decoder's arguments and what the layer before returned for them
        (None for the first layer) to what this layer returns.
    """
    before: list[Outputs] = [None]
    poison: list[Outputs] = [None]

    def answer_before(*_: Any, **__: Any) -> Outputs:
        return before[0]

    def answer_poison(*_: Any, **__: Any) -> Outputs:
        return poison[0]

    def run(*arguments: Any, **options: Any) -> Any:
        _refuse_poison(arguments, options, before[0], index)
        given = {name: _describe(value) for name, value in options.items()}
        given["positional"] = _describe(arguments[1:])
        outputs = own_forward(*arguments, **options)
        left = {name: _describe(value) for name, value in options.items()}
        left["positional"] = _describe(arguments[1:])
        # Its first argument is its own to change.
        changed = sorted(n for n in given if n != "hidden_states" and given[n] != left[n])
        if changed:
            raise StreamingError(
                f"a decoder layer must pass on nothing but what it returns, got layer {index} "
                f"({type(layers[index]).__name__}), which changes its argument {changed[0]}."
            )
        raise _LayerDone(outputs)

    own_forward = layers[index].forward
    with contextlib.ExitStack() as stack:
        for number in range(index):
            answer = answer_before if number == index - 1 else answer_poison
            _replace_forward(layers[number], answer, stack)
        _replace_forward(layers[index], run, stack)

        def call(inputs: Mapping[str, Any], outputs_before: Outputs) -> Outputs:
            before[0] = outputs_before
            poison[0] = map_tensors(outputs_before, _poisoned)
            try:
                # Not inference_mode: its tensors do not tell whether they were changed.
                with torch.no_grad():
                    decoder(**inputs)
            except _LayerDone as done:
                return check_outputs(done.outputs, index)
            raise StreamingError(
                f"a decoder must run its layers in order, got {type(decoder).__name__}, which "
                f"did not run layer {index}."
            )

        yield call


def only_head(
    model: nn.Module, layers: nn.ModuleList
) -> contextlib.AbstractContextManager[Callable[[Mapping[str, Any], Outputs], Any]]:
    """Let a model run what follows its decoder layers.

    Args:
        model: The model; what is no decoder layer must have its weights.
        layers: All decoder layers.

    Returns:
        `from_layer` for the layer after the last.
    """
    return from_layer(model, layers, len(layers))


@contextlib.contextmanager
def from_layer(
    model: nn.Module, layers: nn.ModuleList, first: int
) -> Iterator[Callable[[Mapping[str, Any], Outputs], Any]]:
    """Let a model run all but its first decoder layers.

    Args:
        model: The model; what runs must have its weights.
        layers: All decoder layers.
        first: The first that runs, in [0, len(layers)].

    Yields:
        A function from the model's arguments and what the layer before returned for them (None
        for the first layer) to what the model returns.
    """
    answers: list[Outputs] = [None, None]

    def answer_last(*_: Any, **__: Any) -> Outputs:
        return answers[0]

    def answer_poison(*_: Any, **__: Any) -> Outputs:
        return answers[1]

    with contextlib.ExitStack() as stack:
        for number in range(first):
            is_last = number == first - 1
            _replace_forward(layers[number], answer_last if is_last else answer_poison, stack)

        def call(inputs: Mapping[str, Any], outputs_before: Outputs) -> Any:
            answers[0] = outputs_before
            answers[1] = map_tensors(outputs_before, _poisoned)
            with torch.no_grad():
                output = model(**inputs)
            if _has_nan(output.logits) and not _has_nan(outputs_before):
                raise StreamingError(
                    "what follows a decoder layer must depend only on what that layer "
                    f"returned, got {type(model).__name__}, which also reads outputs of "
                    "earlier layers."
                )
            return output

        yield call


def check_outputs(outputs: Any, index: int) -> Outputs:
    """Refuse what cannot be stored.

    Args:
        outputs: What a decoder layer returned.
        index: Which layer.

    Returns:
        The same, detached.

    Raises:
        StreamingError: There is something else in it than tensors, tuples and None.
    """
    if outputs is None:
        return None
    if isinstance(outputs, torch.Tensor):
        return outputs.detach()
    if type(outputs) is tuple:
        return tuple(check_outputs(item, index) for item in outputs)
    raise StreamingError(
        "a decoder layer must return tensors or tuples of them, got a "
        f"{type(outputs).__name__} from layer {index}."
    )


def map_tensors(outputs: Outputs, change: Callable[[torch.Tensor], Any]) -> Any:
    """Apply a function to every tensor of a layer's outputs.

    Args:
        outputs: What a layer returned.
        change: The function.

    Returns:
        The same structure with the results.
    """
    if outputs is None:
        return None
    if isinstance(outputs, torch.Tensor):
        return change(outputs)
    return tuple(map_tensors(item, change) for item in outputs)


def _replace_forward(
    module: nn.Module, forward: Callable[..., Any], stack: contextlib.ExitStack
) -> None:
    own = vars(module).get("forward")
    if own is None:
        stack.callback(delattr, module, "forward")
    else:
        stack.callback(setattr, module, "forward", own)
    module.forward = forward


def _poisoned(tensor: torch.Tensor) -> torch.Tensor:
    return torch.full_like(tensor, float("nan")) if tensor.is_floating_point() else tensor


def _has_nan(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.is_floating_point() and bool(torch.isnan(value).any())
    if isinstance(value, (tuple, list)):
        return any(_has_nan(item) for item in value)
    return isinstance(value, dict) and any(_has_nan(item) for item in value.values())


def _refuse_poison(
    arguments: tuple[Any, ...], options: dict[str, Any], before: Outputs, index: int
) -> None:
    if _has_nan((arguments, options)) and not _has_nan(before):
        raise StreamingError(
            "a decoder layer must depend only on what the layer before it returned, got layer "
            f"{index}, which also reads outputs of earlier layers."
        )


def _describe(value: Any, depth: int = _DEPTH) -> Any:
    """Reduce a value to what differs once somebody has changed it in place."""
    if isinstance(value, torch.Tensor):
        return (id(value), value._version)
    if isinstance(value, (str, bytes, int, float, bool, type(None))):
        return value
    if depth == 0 or isinstance(value, nn.Module):
        return id(value)
    if isinstance(value, dict):
        return {str(key): _describe(item, depth - 1) for key, item in value.items()}
    if isinstance(value, (tuple, list, set, frozenset)):
        return [_describe(item, depth - 1) for item in value]
    if hasattr(value, "__dict__"):
        return {key: _describe(item, depth - 1) for key, item in vars(value).items()}
    return id(value)
