"""How far weights that were stored quantised are from their reference, form by form.

    python -m benchmarks.quantised_formats [--json FILE]

Tiny checkpoints of several families are stored in each form as the tests store them, with
random numbers and scales; the reference is transformers' own dequantisation, or the producers'
arithmetic where transformers has none. What is compared is every weight of the file and of the
model, opened whole and one layer at a time.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from benchmarks.tables import write_table
from edgemoe.models import load_model
from edgemoe.models.opening import open_streamed
from edgemoe.models.quantised.tensors import QuantisedTensor
from edgemoe.models.safety import check_weights
from edgemoe.models.weights.tensor_files import list_tensors
from tests.edgemoe.models.quantised import (
    test_compressed,
    test_fp8,
    test_mxfp4,
    test_packed_columns,
)
from tests.edgemoe.models.quantised.storing import write_both

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch

FAMILIES = ("qwen3_moe", "deepseek_v3", "mixtral", "glm4_moe", "minimax_m2")
_TRANSFORMERS = "transformers"


@dataclass(frozen=True, kw_only=True)
class Form:
    """One form of storing weights.

    Attributes:
        name: What the table calls it.
        reference: Whose dequantisation it is compared with.
        store: Quantises a weight and says what is meant.
        announce: What config.json, or `beside`, says of it.
        beside: File that announces it.
        chosen: Which weights are stored so.
        families: Where it is tried.
    """

    name: str
    reference: str
    store: Any
    announce: Mapping[str, Any]
    beside: str | None = None
    chosen: Callable[[str, torch.Tensor], bool] | None = None
    families: tuple[str, ...] = FAMILIES


def _compressed(name: str, kind: str, **made: Any) -> Form:
    strategy = made["strategy"]
    block = test_compressed.BLOCK
    told = test_compressed.announcement(
        kind,
        num_bits=made.get("bits", 8),
        type=made.get("number", "int"),
        strategy=strategy,
        symmetric=made.get("symmetric", True),
        group_size=test_compressed.GROUP if strategy == "group" else None,
        block_structure=list(block) if strategy == "block" else None,
    )
    packed = kind == test_compressed.PACKED
    return Form(
        name=f"compressed-tensors {name}",
        reference="compressed-tensors' formula",
        store=partial(test_compressed.store, packed=packed, **made),
        announce=told,
    )


def _columns(name: str, announce: Mapping[str, Any], **made: Any) -> Form:
    return Form(
        name=name,
        reference=f"{name.split()[0]}'s formula",
        store=partial(test_packed_columns.store, **made),
        announce=announce,
        chosen=test_packed_columns.fits,
    )


GPTQ, AWQ = test_packed_columns.GPTQ, test_packed_columns.AWQ
PACKED = test_compressed.PACKED
FORMS = (
    Form(
        name="FP8, blocks",
        reference=_TRANSFORMERS,
        store=test_fp8.by_block,
        announce=test_fp8.BLOCKS,
    ),
    Form(
        name="FP8, channels",
        reference=_TRANSFORMERS,
        store=test_fp8.by_channel,
        announce=test_fp8.FP8,
    ),
    Form(
        name="FP8 of ModelOpt, beside config.json",
        reference=_TRANSFORMERS,
        store=test_fp8.by_tensor,
        announce=test_fp8.MODELOPT,
        beside="hf_quant_config.json",
    ),
    Form(
        name="mxfp4",
        reference=_TRANSFORMERS,
        store=test_mxfp4.store,
        announce=test_mxfp4.MXFP4,
        chosen=lambda _, tensor: tensor.dim() == 3,
        families=("gpt_oss",),
    ),
    _columns("GPTQ int4", GPTQ),
    _columns("GPTQ int4, act-order", {**GPTQ, "desc_act": True}, ordered=True),
    _columns("GPTQ int8", {**GPTQ, "bits": 8}, bits=8),
    _columns("AWQ int4", AWQ, kind="awq"),
    _compressed("int4, groups", PACKED, bits=4, strategy="group"),
    _compressed("int4, groups, zero points", PACKED, bits=4, strategy="group", symmetric=False),
    _compressed("int8, channels", "int-quantized", strategy="channel"),
    _compressed("FP8, blocks", "float-quantized", number="float", strategy="block"),
)


@click.command(help=__doc__)
@click.option(
    "--json", "json_file", type=click.Path(path_type=Path), help="Also write it here."
)
def main(json_file: Path | None) -> None:
    """Try every form with every family and print the table."""
    rows: list[list[Any]] = []
    for form in FORMS:
        for family in form.families:
            with tempfile.TemporaryDirectory() as folder:
                quantised, plain = write_both(
                    family,
                    Path(folder),
                    form.store,
                    form.announce,
                    beside=form.beside,
                    chosen=form.chosen,
                )
                count, whole, streamed = compare(quantised, plain)
            rows.append([form.name, family, form.reference, count, whole, streamed])
    heading = ["form", "family", "reference", "weights", "whole", "streamed"]
    write_table(heading, [[*row[:3], *(f"{number:g}" for number in row[3:])] for row in rows])
    if json_file is not None:
        content = [dict(zip(heading, row, strict=True)) for row in rows]
        json_file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def compare(quantised: Path, plain: Path) -> tuple[int, float, float]:
    """Compare a quantised checkpoint with a plain one of the numbers that it means.

    Args:
        quantised: The quantised one.
        plain: The plain one.

    Returns:
        How many weights are quantised, and the largest difference over the file and the whole
        model, and over the layers read one by one.
    """
    wanted = {name: of.read() for name, of in list_tensors(check_weights(plain)).items()}
    found = list_tensors(check_weights(quantised))
    whole = max(_difference(found[name].read(), wanted[name]) for name in wanted)
    tensors = load_model(quantised).model.state_dict()
    reference = load_model(plain).model.state_dict()
    whole = max(whole, *(_difference(tensors[name], reference[name]) for name in reference))
    skeleton = open_streamed(quantised).skeleton
    streamed = 0.0
    for index in range(len(skeleton.layers)):
        with skeleton.layer(index):
            held = skeleton.layer_tensors(index)
            known = [name for name in held if name in reference]
            assert known
            streamed = max(
                streamed, *(_difference(held[name], reference[name]) for name in known)
            )
    count = sum(isinstance(tensor, QuantisedTensor) for tensor in found.values())
    return count, whole, streamed


def _difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    assert found.shape == wanted.shape
    return float((found.float() - wanted.float()).abs().max())


if __name__ == "__main__":
    main()
