"""What each feed-forward layer of a dense model sees on calibration text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgemoe.progress import track

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from transformers import PreTrainedModel


def feed_forward_inputs(
    model: PreTrainedModel, windows: Sequence[Sequence[int]]
) -> list[torch.Tensor]:
    """Run the dense model and keep the input of every feed-forward layer.

    Args:
        model: Dense decoder.
        windows: Token ids, one sequence per window.

    Returns:
        Per layer, float32 `[tokens, hidden_size]`. The first token of each window is left
        out: it is an attention sink, whose huge activations would drown all others.
    """
    import torch

    layers: Any = model.model.layers
    seen: list[list[torch.Tensor]] = [[] for _ in layers]

    def keep(index: int) -> Any:
        def hook(_module: Any, arguments: tuple[Any, ...]) -> None:
            seen[index].append(arguments[0][:, 1:].reshape(-1, arguments[0].shape[-1]).clone())

        return hook

    handles = [
        layer.mlp.register_forward_pre_hook(keep(index)) for index, layer in enumerate(layers)
    ]
    try:
        with torch.no_grad():
            for window in track(windows, "reading calibration text"):
                model.model(torch.tensor([list(window)]), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [torch.cat(parts) for parts in seen]


def neuron_activations(mlp: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Intermediate activations of a gated feed-forward layer.

    Args:
        mlp: Module with `gate_proj`, `up_proj` and `act_fn`.
        hidden: float32 `[tokens, hidden_size]`.

    Returns:
        float32 `[tokens, intermediate_size]`: `act(gate(x)) * up(x)`.
    """
    import torch

    with torch.no_grad():
        activations: torch.Tensor = mlp.act_fn(mlp.gate_proj(hidden)) * mlp.up_proj(hidden)
        return activations
