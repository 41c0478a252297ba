"""How many experts scored tokens use, in the mean over tokens and MoE layers."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch

from edgemoe.models.hooks import check_k_cap, observe

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from edgemoe.models.contract import MoeModel
    from edgemoe.models.layers.layer import MoeLayer
    from edgemoe.models.routing.routers import Routing


class ExpertCount:
    """Counts the experts that tokens use, where they choose their number.

    Attributes:
        real: Which tokens of the batch that runs are no padding, bool `[rows, width]`.
    """

    real: torch.Tensor

    def __init__(self, model: MoeModel, k_cap: int | Sequence[int] | None) -> None:
        """Begin to count.

        Args:
            model: The model that is to run.
            k_cap: Most experts per token, one for all MoE layers or one for each.

        Raises:
            EdgemoeError: `k_cap` is out of range.
        """
        self._model = model
        most = [layer.top_k for layer in model.layers]
        caps = most if k_cap is None else check_k_cap(k_cap, len(most))
        self._most = list(map(min, most, caps))
        self._used, self._passed = 0, 0

    @property
    def mean(self) -> float | None:
        """Experts per token and MoE layer; None as long as tokens that choose did not run."""
        if self._model.k_policy is None:
            return sum(self._most) / len(self._most)
        return self._used / self._passed if self._passed else None

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Count in the model's forward passes until the block ends."""
        if self._model.k_policy is None:
            yield
            return

        def count(layer: MoeLayer, _: torch.Tensor, routing: Routing, __: object) -> None:
            used = (routing.indices < layer.num_experts).sum(dim=-1)
            real = self.real.to(used.device)
            self._used += int(used.reshape(real.shape)[real].sum())
            self._passed += int(real.sum())

        with observe(self._model, count):
            yield

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """Return what was counted, for a pass that may be interrupted."""
        return {"experts_used": torch.tensor([self._used, self._passed])}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take what `to_tensors` returned in an earlier process."""
        self._used, self._passed = tensors["experts_used"].tolist()
