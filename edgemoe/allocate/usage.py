"""How many experts tokens really use."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from edgemoe.models.hooks import observe

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from edgemoe.calibrate.sample import Window
    from edgemoe.models.contract import MoeModel
    from edgemoe.models.layers.layer import MoeLayer
    from edgemoe.models.routing.routers import Routing


@torch.inference_mode()
def count_experts(model: MoeModel, windows: Sequence[Window]) -> NDArray[np.int64]:
    """Count the experts that each token uses in each layer.

    Args:
        model: The model, with whatever policy and cap are in force.
        windows: The tokens.

    Returns:
        int64 [tokens, MoE layers].
    """
    places = {layer.index: place for place, layer in enumerate(model.layers)}
    rows: list[list[NDArray[np.int64]]] = []

    def look(layer: MoeLayer, _: torch.Tensor, routing: Routing, __: object) -> None:
        used = (routing.indices < layer.num_experts).sum(dim=-1)
        rows[-1][places[layer.index]] = used.reshape(-1).cpu().numpy()

    decoder = model.model.base_model
    with observe(model, look):
        for window in windows:
            rows.append([np.zeros(0, np.int64)] * len(places))
            ids = torch.tensor([window.ids], device=model.model.device)
            decoder(input_ids=ids, use_cache=False)
    return np.concatenate([np.stack(row, axis=1) for row in rows])
