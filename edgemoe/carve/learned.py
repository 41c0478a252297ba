"""What a distillation learned on top of a carve: small enough to ship, exact to repeat.

A learned carve is the channel assignment and the router of every layer, low-rank deltas of the
projections, and the norms. With the dense checkpoint it was learned on, it gives the
distilled MoE back in a minute. `benchmarks/reference_moe/distil.py` makes one.

The file is safetensors. A delta is `b @ diag(scale) @ a` with `a` int8 `[rank, in]`,
`b` int8 `[out, rank]` and `scale` float32 `[rank]`; deltas of feed-forward
projections refer to channels in the order of the assignment.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from edgemoe.carve.build import CarvedLayer, build_moe
from edgemoe.carve.channels import NeuronAssignment
from edgemoe.carve.router import LinearRouter
from edgemoe.errors import CarveError
from edgemoe_runtime.input_files import parse_strict

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

FORMAT = "edgemoe.learned-carve"
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True, kw_only=True)
class LearnedCarve:
    """A carve, and the changes to the dense weights that make it good.

    Attributes:
        experts: Routed experts per layer.
        shared_size: Intermediate channels that every token uses.
        top_k: Routed experts per token.
        dense_sha256: `weights_sha256` of the dense model it was learned on.
        tensors: Per layer `{i}.order` int16 `[neurons]`, `{i}.router.weight` float16
            `[experts, hidden]`, `{i}.router.bias` float16 `[experts]`, the norms
            float16 `[hidden]`, and `{i}.{projection}.a|b|scale`; `norm` float16.
        provenance: How it was made; free-form.
    """

    experts: int
    shared_size: int
    top_k: int
    dense_sha256: str
    tensors: Mapping[str, NDArray[Any]]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> LearnedCarve:
        """Read a learned carve.

        Args:
            path: The safetensors file.

        Returns:
            The learned carve.

        Raises:
            CarveError: The file is missing or is not a learned carve.
        """
        from safetensors import SafetensorError, safe_open

        if not path.is_file():
            raise CarveError(f"a learned carve must be a file, got {path}. Check the path.")
        try:
            with safe_open(path, framework="numpy") as file:
                header = file.metadata() or {}
                names = list(file.keys())
                tensors = {name: file.get_tensor(name) for name in names}
            if header.get("format") != FORMAT:
                raise CarveError(
                    f"a learned carve must say format {FORMAT}, got {header.get('format')} in "
                    f"{path}. Give a file made by benchmarks/reference_moe/distil.py."
                )
            return cls(
                experts=int(header["experts"]),
                shared_size=int(header["shared_size"]),
                top_k=int(header["top_k"]),
                dense_sha256=header["dense_sha256"],
                tensors=tensors,
                provenance=parse_strict(header["provenance"]),
            )
        except (SafetensorError, KeyError, ValueError) as error:
            if isinstance(error, CarveError):
                raise
            raise CarveError(
                f"{path} could not be read as a learned carve: {error}. Get the file again."
            ) from error

    def save(self, path: Path) -> None:
        """Write the learned carve; the same content gives the same bytes.

        Args:
            path: File to write.
        """
        from safetensors.numpy import save_file

        header = {
            "format": FORMAT,
            "experts": str(self.experts),
            "shared_size": str(self.shared_size),
            "top_k": str(self.top_k),
            "dense_sha256": self.dense_sha256,
            "provenance": json.dumps(dict(self.provenance), sort_keys=True),
        }
        save_file(
            {name: np.ascontiguousarray(v) for name, v in self.tensors.items()}, path, header
        )

    def apply(self, dense: PreTrainedModel) -> PreTrainedModel:
        """Rebuild the distilled MoE.

        Args:
            dense: The dense model it was learned on; its weights are changed in place.

        Returns:
            The MoE model in float32, in eval mode.

        Raises:
            CarveError: `dense` is another model, or tensors are missing.
        """
        found = weights_sha256(dense)
        if found != self.dense_sha256:
            raise CarveError(
                f"the dense weights must be those of sha256 {self.dense_sha256[:12]}..., got "
                f"{found[:12]}.... The carve was learned on another checkpoint: use that one, "
                "or carve without --learned."
            )
        state = dense.state_dict()
        try:
            layers = [
                self._apply_layer(index, state)
                for index in range(dense.config.num_hidden_layers)
            ]
            state["model.norm.weight"].copy_(self._float("norm"))
        except KeyError as error:
            raise CarveError(
                f"a learned carve must hold every tensor, got none named {error}. "
                "Get the file again."
            ) from error
        return build_moe(dense, layers, top_k=self.top_k)

    def _apply_layer(self, index: int, state: Mapping[str, torch.Tensor]) -> CarvedLayer:
        import torch

        order = self.tensors[f"{index}.order"].astype(np.int64)
        neurons = torch.from_numpy(order)
        prefix = f"model.layers.{index}"
        for name in FEED_FORWARD:
            weight = state[f"{prefix}.mlp.{name}.weight"]
            delta = self._delta(f"{index}.{name}")
            if name == "down_proj":
                weight[:, neurons] += delta
            else:
                weight[neurons] += delta
        for name in ATTENTION:
            state[f"{prefix}.self_attn.{name}.weight"] += self._delta(f"{index}.{name}")
        for name in ("input_layernorm", "post_attention_layernorm"):
            state[f"{prefix}.{name}.weight"].copy_(self._float(f"{index}.{name}"))
        return CarvedLayer(
            assignment=NeuronAssignment(
                shared=order[: self.shared_size],
                experts=order[self.shared_size :].reshape(self.experts, -1),
            ),
            router=LinearRouter(
                weight=self.tensors[f"{index}.router.weight"].astype(np.float32),
                bias=self.tensors[f"{index}.router.bias"].astype(np.float32),
            ),
        )

    def _delta(self, name: str) -> torch.Tensor:
        import torch

        a = torch.from_numpy(self.tensors[f"{name}.a"]).float()
        b = torch.from_numpy(self.tensors[f"{name}.b"]).float()
        return (b * torch.from_numpy(self.tensors[f"{name}.scale"])) @ a

    def _float(self, name: str) -> torch.Tensor:
        import torch

        return torch.from_numpy(self.tensors[name].astype(np.float32))


def pack_delta(
    a: NDArray[np.float32], b: NDArray[np.float32]
) -> tuple[NDArray[np.int8], NDArray[np.int8], NDArray[np.float32]]:
    """Round a low-rank delta to int8, one scale per rank.

    Args:
        a: float32 `[rank, in]`.
        b: float32 `[out, rank]`.

    Returns:
        `a` int8, `b` int8 and `scale` float32 `[rank]`, so that `b @ diag(scale) @ a`
        is near the product of the arguments.
    """
    a_scale = np.maximum(np.abs(a).max(axis=1), 1e-12) / 127
    b_scale = np.maximum(np.abs(b).max(axis=0), 1e-12) / 127
    return (
        np.rint(a / a_scale[:, None]).astype(np.int8),
        np.rint(b / b_scale).astype(np.int8),
        (a_scale * b_scale).astype(np.float32),
    )


def weights_sha256(model: PreTrainedModel) -> str:
    """Hash a model's weights: names, shapes and float32 bytes, by name.

    Args:
        model: Any model.

    Returns:
        Hexadecimal SHA-256.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        array = tensor.detach().to("cpu").float().contiguous().numpy()
        digest.update(f"{name}{array.shape}".encode())
        digest.update(memoryview(array).cast("B"))
    return digest.hexdigest()
