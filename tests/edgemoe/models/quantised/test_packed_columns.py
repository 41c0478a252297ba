"""GPTQ and AWQ: the numbers that their producers' arithmetic gives, written out here."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgemoe.errors import CheckpointError
from edgemoe.models import load_model
from edgemoe.models.opening import open_streamed
from edgemoe.models.quantised.decoding import unpack
from tests.edgemoe.models.quantised.storing import (
    announce_in_config,
    change_tensors,
    is_linear,
    write_both,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

GROUP = 16
GPTQ: dict[str, Any] = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": GROUP,
    "desc_act": False,
    "sym": False,
    "damp_percent": 0.1,
    "true_sequential": True,
    "meta": {"quantizer": ["gptqmodel:4.0"]},
}
AWQ: dict[str, Any] = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": GROUP,
    "version": "gemm",
    "zero_point": True,
    "modules_to_not_convert": None,
}
# AutoAWQ's kernels take the outputs of a word in this order.
AWQ_PLACES = [0, 2, 4, 6, 1, 3, 5, 7]
STEM = "model.layers.1.mlp.experts.3.up_proj."


def pack(numbers: np.ndarray[Any, Any], bits: int, places: list[int] | None = None) -> Any:
    """Pack the rows of whole numbers into words, from the lowest bits on."""
    per_word = 32 // bits
    words = numbers.reshape(len(numbers), -1, per_word).astype(np.uint64)
    packed = np.zeros(words.shape[:2], dtype=np.uint64)
    for place in range(per_word):
        which = place if places is None else places[place]
        packed |= words[..., which] << np.uint64(bits * place)
    return torch.from_numpy(packed.astype(np.uint32).view(np.int32))


def store(
    name: str,
    weight: torch.Tensor,
    *,
    bits: int = 4,
    group: int = GROUP,
    kind: str = "gptq",
    ordered: bool = False,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    outputs, inputs = weight.shape
    group = inputs if group < 0 else group
    numbers = torch.randint(0, 2**bits, (inputs, outputs))
    zeros = torch.randint(0, 2**bits, (inputs // group, outputs))
    scales = (torch.rand(zeros.shape) * 0.02 + 0.001).half()
    order = torch.arange(inputs) // group
    if ordered:
        order = order[torch.randperm(inputs)]
    meant = (scales[order] * (numbers - zeros[order]).half()).T.to(torch.bfloat16)
    stem = name.removesuffix("weight")
    if kind == "awq":
        packed = pack(numbers.numpy(), 4, AWQ_PLACES)
        packed_zeros = pack(zeros.numpy(), 4, AWQ_PLACES)
    else:
        told = zeros if kind == "gptq_v2" else (zeros - 1) % 2**bits
        packed = pack(numbers.numpy().T, bits).T
        packed_zeros = pack(told.numpy(), bits)
    parts = {f"{stem}qweight": packed, f"{stem}qzeros": packed_zeros, f"{stem}scales": scales}
    if kind != "awq":
        parts[f"{stem}g_idx"] = order.to(torch.int32)
    return parts, meant


def fits(name: str, weight: torch.Tensor) -> bool:
    return is_linear(name, weight) and all(side % GROUP == 0 for side in weight.shape)


@pytest.mark.parametrize(
    ("family", "made", "told"),
    [
        ("qwen3_moe", {}, {}),
        ("deepseek_v3", {}, {"checkpoint_format": "gptq"}),
        ("mixtral", {"ordered": True}, {"desc_act": True}),
        ("qwen3_moe", {"kind": "gptq_v2"}, {"checkpoint_format": "gptq_v2"}),
        ("glm4_moe", {"bits": 8}, {"bits": 8, "sym": True}),
        ("minimax_m2", {"group": -1}, {"group_size": -1}),
    ],
)
def test_gptq_is_read_exactly(
    family: str, made: dict[str, Any], told: dict[str, Any], tmp_path: Path, check_same: Any
) -> None:
    quantised, plain = write_both(
        family, tmp_path, partial(store, **made), {**GPTQ, **told}, chosen=fits
    )

    assert check_same(quantised, plain) > 50


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "mixtral"])
def test_awq_is_read_exactly(family: str, tmp_path: Path, check_same: Any) -> None:
    quantised, plain = write_both(
        family, tmp_path, partial(store, kind="awq"), AWQ, chosen=fits
    )

    assert check_same(quantised, plain) > 50


@pytest.mark.parametrize(
    ("kind", "file", "content"),
    [
        ("gptq", "quantize_config.json", {"bits": 4, "group_size": GROUP, "desc_act": False}),
        ("awq", "quant_config.json", {"w_bit": 4, "q_group_size": GROUP, "version": "GEMM"}),
    ],
)
def test_files_beside_config_json_are_read(
    kind: str, file: str, content: dict[str, Any], tmp_path: Path, check_same: Any
) -> None:
    quantised, plain = write_both(
        "mixtral", tmp_path, partial(store, kind=kind), content, beside=file, chosen=fits
    )

    assert check_same(quantised, plain) > 50


@settings(max_examples=50, deadline=None)
@given(st.sampled_from([4, 8]), st.integers(0, 1), st.data())
def test_unpacking_undoes_packing(bits: int, dim: int, data: st.DataObject) -> None:
    count = 2 * 32 // bits
    row = st.lists(st.integers(0, 2**bits - 1), min_size=count, max_size=count)
    numbers = np.array([data.draw(row) for _ in range(3)])
    packed = pack(numbers, bits)

    found = unpack(packed if dim == 1 else packed.T.contiguous(), bits, dim)

    assert np.array_equal(found.numpy(), numbers if dim == 1 else numbers.T)


@pytest.fixture
def quantised(tmp_path: Path) -> Path:
    return write_both("glm4_moe", tmp_path, store, GPTQ, chosen=fits)[0]


@pytest.mark.parametrize("read", [load_model, open_streamed])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scales": None}, f"{STEM}qweight without {STEM}scales"),
        ({"qzeros": None}, f"{STEM}qweight without {STEM}qzeros"),
        ({"scales": torch.ones(2, 32).half()}, f"{STEM}scales of type F16"),
        ({"g_idx": torch.zeros(8, dtype=torch.int32)}, f"{STEM}g_idx of type I32"),
        ({"qweight": torch.ones(8, 32)}, f"{STEM}qweight of type F32"),
        ({"weight": torch.ones(32, 64, dtype=torch.bfloat16)}, "twice, plain and quantised"),
        ({"qother": torch.ones(2, 32)}, f"{STEM}qother"),
    ],
)
def test_packed_numbers_are_not_used_without_their_parts(
    quantised: Path,
    read: Callable[[Path], object],
    changes: dict[str, torch.Tensor | None],
    message: str,
) -> None:
    change_tensors(quantised, {f"{STEM}{name}": tensor for name, tensor in changes.items()})

    with pytest.raises(CheckpointError, match=message):
        read(quantised)


@pytest.mark.parametrize("group", [-1, 4])
def test_inputs_of_a_group_that_is_not_there_are_refused(quantised: Path, group: int) -> None:
    change_tensors(quantised, {f"{STEM}g_idx": torch.full((64,), group, dtype=torch.int32)})

    with pytest.raises(CheckpointError, match=f"groups {group} to {group} of 4"):
        load_model(quantised)
    skeleton = open_streamed(quantised).skeleton
    with (
        pytest.raises(CheckpointError, match=f"groups {group} to {group} of 4"),
        skeleton.layer(1),
    ):
        pass


@pytest.mark.parametrize(
    "announce",
    [
        {**GPTQ, "bits": 3},
        {**GPTQ, "bits": 8},
        {**GPTQ, "group_size": 32},
        {**GPTQ, "group_size": 0},
        {**GPTQ, "desc_act": True, "checkpoint_format": "marlin"},
        {**GPTQ, "rotation": "hadamard"},
        {**GPTQ, "pack_dtype": "int16"},
        {**AWQ, "version": "gemv"},
        {**AWQ, "zero_point": False},
        AWQ,
    ],
)
def test_other_announcements_are_refused_by_name(
    quantised: Path, announce: dict[str, Any]
) -> None:
    announce_in_config(quantised, announce)

    with pytest.raises(CheckpointError, match="a quantised form that edgemoe reads, got"):
        load_model(quantised)
