"""A copy of a router with random weights, to be asked what it does."""

from __future__ import annotations

import copy
import inspect
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgemoe.models.expert_tensors import CountAttribute, ExpertTensor

# Prime, so that a router that reshapes by groups cannot mistake tokens for groups.
_TOKENS = 211


@dataclass(frozen=True)
class Answer:
    """Output of a router for the probes.

    Attributes:
        logits: What it returns first, float32 [tokens, ...]; logits in most families.
        weights: Gates float32 [tokens, top_k].
        indices: Experts int64 [tokens, top_k].
        projected: What its linear submodule returned, where it has one.
        transformed: Whether that submodule got something else than the router's input.
    """

    logits: torch.Tensor
    weights: torch.Tensor
    indices: torch.Tensor
    projected: torch.Tensor | None
    transformed: bool


class RouterProbe:
    """A router on the CPU with random weights, which can lose experts.

    Args:
        block: The MoE block; its tensors may be on the meta device.
        router: Attribute of the block that is the router.
        tensors: What has one entry per expert, named from the block on.
        counts: Numbers that follow the number of experts, named from the block on.
        experts: How many there are.
        hidden_size: Width of the router's input.

    Attributes:
        hidden: The probes, float32 [tokens, hidden].
        rows: Name, from the block on, of the router rows; None where there is no such tensor.
        vectors: The tensors with one number per expert, float32 [experts], by name.
        further_rows: Rows after those of the experts, which may stand for the choice of none,
            or for experts that every token uses.
        table: Name of the experts of each id, if there is such a table.
        gate_scale: Name and value of a number that all gates are proportional to, if there is
            one.
    """

    def __init__(
        self,
        block: nn.Module,
        router: str,
        tensors: Sequence[ExpertTensor],
        counts: Sequence[CountAttribute],
        experts: int,
        hidden_size: int,
    ) -> None:
        random = torch.Generator().manual_seed(0)
        self._name = router
        self._router = copy.deepcopy(block.get_submodule(router)).to_empty(device="cpu").eval()
        self._specs = {
            spec.name: spec
            for spec in tensors
            if "." not in spec.name or spec.name.startswith(f"{router}.")
        }
        self._counts = [
            count for count in counts if f"{count.module}.".startswith(f"{router}.")
        ]
        self._experts = experts
        self._beside: dict[str, torch.Tensor] = {}
        for name in self._specs:
            if "." not in name:
                shape = getattr(block, name).shape
                self._beside[name] = 0.3 * torch.randn(shape, generator=random)
        self._fill(random)
        self.hidden = torch.randn(_TOKENS, hidden_size, generator=random)
        tables = [b for b in self._router.buffers() if not b.is_floating_point()]
        rows = min((len(table) for table in tables), default=1)
        self._ids = torch.arange(_TOKENS)[None] % rows
        held = {name: self._tensor(name) for name in self._specs}
        matrices = [name for name, value in held.items() if _is_matrix(value)]
        self.rows = matrices[0] if len(matrices) == 1 else None
        self.further_rows = 0 if self.rows is None else self._specs[self.rows].tail
        self.vectors = {
            name: value.flatten() for name, value in held.items() if not _is_matrix(value)
        }
        self.gate_scale = self._find_gate_scale()
        named = self._router.named_buffers()
        of_ids = [f"{router}.{name}" for name, held in named if not held.is_floating_point()]
        self.table = of_ids[0] if len(of_ids) == 1 else None

    def row_weights(self) -> torch.Tensor:
        """Return the router rows, float32 [experts, inputs]."""
        assert self.rows is not None
        return self._tensor(self.rows)

    def table_rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the table, int64 [ids, top_k], and the ids of the probes, int64 [tokens]."""
        assert self.table is not None
        return self._tensor(self.table), self._ids[0]

    def projection(self) -> str:
        """Return the submodule that applies the rows; empty where the router itself does."""
        assert self.rows is not None
        owner = self.rows.rpartition(".")[0].removeprefix(self._name).removeprefix(".")
        return owner if isinstance(self._router.get_submodule(owner), nn.Linear) else ""

    def ask(self) -> Answer:
        """Run the router on the probes.

        Raises:
            Exception: Whatever the family raises, as with too few experts.
        """
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        handle = None
        if self.rows is not None and self.projection():
            linear = self._router.get_submodule(self.projection())
            handle = linear.register_forward_hook(
                lambda _, given, output: seen.append((given[0], output))
            )
        try:
            logits, weights, indices = self._call()
        finally:
            if handle is not None:
                handle.remove()
        top_k = indices.shape[-1]
        projected, transformed = None, False
        if seen:
            given = seen[-1][0].reshape(_TOKENS, -1)
            projected = seen[-1][1].reshape(_TOKENS, -1).float()
            transformed = given.shape != self.hidden.shape or not torch.equal(
                given.float(), self.hidden
            )
        return Answer(
            logits.reshape(_TOKENS, -1).float(),
            weights.reshape(_TOKENS, top_k).float(),
            indices.reshape(_TOKENS, top_k),
            projected,
            transformed,
        )

    def runs_with(self, experts: int) -> bool:
        """Return whether the router runs with fewer experts, the first of those that it has."""
        reduced = copy.copy(self)
        reduced._router = copy.deepcopy(self._router)
        reduced._beside = dict(self._beside)
        for name, spec in self._specs.items():
            value = self._tensor(name)
            first = value.narrow(spec.axis, 0, experts)
            last = value.narrow(spec.axis, self._experts, spec.tail)
            kept = torch.cat((first, last), dim=spec.axis)
            if name in self._beside:
                reduced._beside[name] = kept
            else:
                module, _, attribute = name.removeprefix(f"{self._name}.").rpartition(".")
                getattr(reduced._router.get_submodule(module), attribute).data = kept
        for table in reduced._router.buffers():
            if not table.is_floating_point():
                table.data = table % experts
        for count in self._counts:
            path = count.module.removeprefix(self._name).removeprefix(".")
            setattr(reduced._router.get_submodule(path), count.name, experts + count.tail)
        try:
            answer = reduced.ask()
        except Exception:  # whatever a family raises with too few experts
            return False
        return bool(answer.weights.isfinite().all())

    def _find_gate_scale(self) -> tuple[str, float] | None:
        for name, tensor in self._router.named_parameters():
            if tensor.numel() != 1:
                continue
            value = tensor.data.clone()
            try:
                before = self.ask().weights
                tensor.data = 2 * value
                after = self.ask().weights
            except Exception:  # whatever a family raises on settings that make no sense
                return None
            finally:
                tensor.data = value
            if torch.allclose(after, 2 * before):
                return f"{self._name}.{name}", float(tensor.detach())
        return None

    def _fill(self, random: torch.Generator) -> None:
        for name, tensor in itertools.chain(
            self._router.named_parameters(), self._router.named_buffers()
        ):
            if not tensor.is_floating_point():
                tensor.data = torch.randint(self._experts, tensor.shape, generator=random)
                continue
            noise = torch.randn(tensor.shape, generator=random)
            if _is_matrix(tensor):
                noise /= tensor.shape[-1] ** 0.5
            elif f"{self._name}.{name}" in self._specs:
                noise *= 0.3
            else:
                noise = 1 + 0.1 * noise
            tensor.data = noise

    def _tensor(self, name: str) -> torch.Tensor:
        if name in self._beside:
            return self._beside[name]
        module, _, attribute = name.removeprefix(f"{self._name}.").rpartition(".")
        found: torch.Tensor = getattr(self._router.get_submodule(module), attribute)
        return found.detach()

    @torch.no_grad()
    def _call(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        beside = list(self._beside.values())
        extra: list[torch.Tensor] = []
        _, *parameters = inspect.signature(self._router.forward).parameters.values()
        for parameter in parameters:
            if beside:
                extra.append(beside.pop(0))
            elif parameter.default is inspect.Parameter.empty and parameter.kind in (
                inspect.Parameter.POSITIONAL_OR_KEYWORD,
                inspect.Parameter.POSITIONAL_ONLY,
            ):
                # What else a router cannot do without are the tokens' ids.
                extra.append(self._ids)
        try:
            output = self._router(self.hidden, *extra)
        except (ValueError, IndexError):  # some routers want [batch, tokens, hidden]
            output = self._router(self.hidden[None], *extra)
        return output[0], output[1], output[2]


def _is_matrix(tensor: torch.Tensor) -> bool:
    return tensor.ndim == 2 and min(tensor.shape) > 1


def linear(hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return the products of inputs and rows in float32 [tokens, rows]."""
    return functional.linear(hidden.float(), rows.float())
