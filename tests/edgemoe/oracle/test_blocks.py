from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import torch

from edgemoe.oracle.blocks import choose_in_blocks

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from edgemoe.calibrate.sample import Window
    from edgemoe.models.contract import MoeModel
    from edgemoe.oracle.oracle import LayerOracle


def outputs_after(
    model: MoeModel, windows: Sequence[Window], layer: int, kept: Mapping[int, Any]
) -> torch.Tensor:
    """What a decoder layer returns when layers up to it keep some experts only."""
    found: list[torch.Tensor] = []

    def keep(_: Any, __: Any, output: Any) -> None:
        found.append(output if isinstance(output, torch.Tensor) else output[0])

    by_index = {one.index: one for one in model.layers}
    before = {index: by_index[index].tensors() for index in kept}
    for index, ids in kept.items():
        by_index[index].keep(ids)
    hook = model.model.get_decoder().layers[layer].register_forward_hook(keep)
    with torch.no_grad():
        for window in windows:
            model.model(input_ids=torch.tensor([window.ids]), use_cache=False)
    hook.remove()
    for index, tensors in before.items():
        by_index[index].replace(tensors)
    return torch.cat([output[0] for output in found]).double()


def test_the_nearest_combination_of_a_block_is_chosen(
    make_oracle: Callable[..., LayerOracle], make_moe: Callable[..., MoeModel]
) -> None:
    """qwen2_moe's second decoder layer is dense: the block runs through it."""
    changes: dict[str, Any] = {"mlp_only_layers": [1]}
    oracle, model = make_oracle("qwen2_moe", **changes), make_moe("qwen2_moe", **changes)
    assert [layer.index for layer in oracle.moe.layers] == [0, 2, 3]
    sets = [(0, 1, 2, 3), (4, 5, 6, 7), (0, 2, 4, 6)]
    chosen = choose_in_blocks(oracle, {0: sets, 2: sets[:2], 3: sets}, block=3)
    target = outputs_after(model, oracle.windows, 3, {})

    def error(combination: tuple[Any, ...]) -> float:
        kept = dict(zip((0, 2, 3), combination, strict=True))
        moved = outputs_after(model, oracle.windows, 3, kept)
        return float((moved - target).square().sum())

    best = min(itertools.product(sets, sets[:2], sets), key=error)
    assert chosen == dict(zip((0, 2, 3), best, strict=True))


def test_blocks_start_from_what_the_whole_model_gives(
    make_oracle: Callable[..., LayerOracle], make_moe: Callable[..., MoeModel]
) -> None:
    oracle, model = make_oracle("mixtral"), make_moe("mixtral")
    sets = [(0, 1, 2), (3, 4, 5), (5, 6, 7)]
    chosen = choose_in_blocks(oracle, dict.fromkeys(range(4), sets), block=1)
    for index in range(4):
        target = outputs_after(model, oracle.windows, index, {})
        errors = {
            kept: float(
                (outputs_after(model, oracle.windows, index, {index: kept}) - target)
                .square()
                .sum()
            )
            for kept in sets
        }
        assert chosen[index] == min(errors, key=errors.__getitem__)
