"""Plans with ranks, carried out in memory and layer by layer."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from edgemoe.apply.in_memory import apply_plan
from edgemoe.apply.streamed import apply_streamed
from edgemoe.calibrate.sample import Window
from edgemoe.decompose.layer_factors import expert_matrices
from edgemoe.decompose.truncation import second_moment, truncate
from edgemoe.errors import OutputError, PlanError
from edgemoe.models import load_model, read_shape, save_model
from edgemoe.models.hooks import observe
from edgemoe.models.layers.factored import product_shapes, ranks_of
from edgemoe.models.ragged import read_ragged_note
from edgemoe.models.shapes import Ranks
from edgemoe.models.tiny import VOCAB_SIZE, write_tiny_checkpoint
from edgemoe.models.weights.fingerprint import fingerprint_checkpoint
from edgemoe.plans.factors import SHARED_BASIS, EmbeddedSample, Factors
from edgemoe.plans.keep_all import keep_all
from edgemoe.plans.plan import LayerPlan, MergedExpert, Plan

if TYPE_CHECKING:
    from edgemoe.models import MoeLayer, MoeModel

KILLED_RUNS = Path(__file__).parents[1] / "killed_runs.py"
MERGED = MergedExpert(members=(2, 3), weights=(3.0, 1.0))
RANKS = ((7, 5), (6, 9), (3, 4), (7, 5))


def draw_windows(seed: int = 3) -> list[Window]:
    random = torch.Generator().manual_seed(seed)
    return [
        Window(
            line=line,
            start=0,
            ids=torch.randint(3, VOCAB_SIZE, (length,), generator=random).tolist(),
        )
        for line, length in enumerate((40, 25, 60), start=1)
    ]


def make_plan(path: Path, method: str, *, whole: bool = False, **options: Any) -> Plan:
    """Keep and merge; factor all layers but the first, with ranks that differ in one."""
    plan = keep_all(read_shape(path))
    experts = [MergedExpert(members=(expert,)) for expert in (0, 1)]
    few = (*experts, MERGED, MergedExpert(members=(5,)))
    equal = ((6, 5),) * 4
    layers = [LayerPlan(layer=layer.layer, experts=few, ranks=equal) for layer in plan.layers]
    layers[0] = replace(layers[0], ranks=None)
    layers[1] = replace(layers[1], ranks=RANKS)
    if method == SHARED_BASIS:
        layers[1:] = [replace(layer, ranks=((8, 8),) * 4) for layer in layers[1:]]
    if whole:
        pair = (16, 16) if method == SHARED_BASIS else (6, 5)
        layers[2] = replace(plan.layers[2], ranks=(pair,) * len(plan.layers[2].experts))
    sample = None if method == "svd" else EmbeddedSample.of(draw_windows())
    return replace(
        plan,
        method="reap",
        layers=tuple(layers),
        checkpoint_sha256=fingerprint_checkpoint(path),
        factors=Factors(method=method, options=options, task="t", sample=sample),
    )


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    files = sorted(path.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def read_bytes(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "glm4_moe", "qwen3_moe"])
@pytest.mark.parametrize("method", ["svd", "svd-whitened", "shared-basis"])
def test_the_checkpoint_is_that_of_applying_in_memory(
    tmp_path: Path, family: str, method: str
) -> None:
    path = write_tiny_checkpoint(family, tmp_path / "moe", dtype=torch.bfloat16)
    plan = make_plan(path, method, whole=True)
    applied = apply_plan(load_model(path), plan)
    whole = tmp_path / "whole"
    whole.mkdir()
    save_model(applied, whole, source=path)

    for name, max_shard_bytes in {"many": 20_000, "again": 20_000, "one": 10**9}.items():
        apply_streamed(path, plan, tmp_path / name, max_shard_bytes=max_shard_bytes)

    expected = read_tensors(whole)
    mark = "input_basis" if method == SHARED_BASIS else "up_in"
    assert any(name.endswith(mark) for name in expected)
    for name in ("many", "one"):
        found = read_tensors(tmp_path / name)
        assert found.keys() == expected.keys()
        for key, tensor in found.items():
            assert tensor.dtype == expected[key].dtype or key.endswith("correction_bias"), key
            assert torch.equal(tensor.float(), expected[key].float()), key
        for file in whole.iterdir():
            if file.suffix == ".json" and "index" not in file.name:
                assert (tmp_path / name / file.name).read_bytes() == file.read_bytes()
    assert read_bytes(tmp_path / "many") == read_bytes(tmp_path / "again")
    model = load_model(tmp_path / "many")
    counts = [4] * len(plan.layers)
    counts[2] = 8
    assert model.experts_per_layer == tuple(counts)
    if method == SHARED_BASIS:
        bases = [None if pair is None else pair[0] for pair in plan.ranks_per_layer]
        assert bases[:3] == [None, 8, 16]
        assert [layer.basis_rank for layer in model.layers] == bases
    else:
        ranks = [None if pair is None else Ranks(*pair) for pair in plan.ranks_per_layer]
        assert ranks[:2] == [None, Ranks(7, 9)]
        assert [ranks_of(layer) for layer in model.layers] == ranks
    note = read_ragged_note(tmp_path / "many")
    assert note is not None
    assert note.provenance["factors"]["method"] == method
    assert "ids" not in json.dumps(note.provenance)


def test_each_layer_is_factored_on_what_factored_layers_return(tmp_path: Path) -> None:
    """The compressed model runs; its own inputs of each layer say which factors are best."""
    path = write_tiny_checkpoint("gpt_oss", tmp_path / "moe")
    plan = make_plan(path, "svd-whitened", prior_tokens=0)
    # Kept, pruned and merged, but not factored: where the weights are from.
    before = apply_plan(load_model(path), without_ranks(plan))
    applied = apply_plan(load_model(path), plan)
    calls: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def keep(layer: MoeLayer, hidden: torch.Tensor, routing: Any, _: Any) -> None:
        calls.setdefault(layer.index, []).append((hidden, routing.indices))

    with torch.no_grad(), observe(applied, keep):
        for window in draw_windows():
            applied.model(torch.tensor([window.ids]))

    for layer, old, layer_plan in zip(applied.layers, before.layers, plan.layers, strict=True):
        if layer_plan.ranks is None:
            continue
        hidden = torch.cat([hidden for hidden, _ in calls[layer.index]])
        indices = torch.cat([indices for _, indices in calls[layer.index]])
        for expert, (rank, _) in enumerate(layer_plan.ranks):
            inputs = hidden[(indices == expert).any(dim=1)]
            weight, _ = expert_matrices(old, expert)
            best = truncate(weight, rank, second_moment(inputs))
            experts: Any = layer.experts
            found = experts.up_out[expert] @ experts.up_in[expert]
            expected = best.outer @ best.inner
            outputs = inputs.double() @ expected.T
            torch.testing.assert_close(
                inputs.double() @ found.double().T, outputs, rtol=1e-3, atol=1e-3
            )


def without_ranks(plan: Plan) -> Plan:
    layers = tuple(replace(layer, ranks=None) for layer in plan.layers)
    return replace(plan, layers=layers, factors=None)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("method", ["svd", "svd-whitened"])
def test_full_rank_changes_nothing_but_rounding(
    tmp_path: Path, family: str, method: str
) -> None:
    path = write_tiny_checkpoint(family, tmp_path / "moe")
    ids = torch.tensor([draw_windows(5)[0].ids])
    model = load_model(path)
    logits = model.model(ids).logits
    plan = make_plan(path, method)
    plan = replace(
        keep_all(model.shape),
        layers=tuple(
            replace(layer, ranks=(full_ranks(model, number),) * 8)
            for number, layer in enumerate(keep_all(model.shape).layers)
        ),
        factors=plan.factors,
    )

    apply_streamed(path, plan, tmp_path / "full")

    after = load_model(tmp_path / "full").model(ids).logits
    torch.testing.assert_close(after, logits, rtol=1e-3, atol=1e-3)


def full_ranks(model: MoeModel, number: int) -> tuple[int, int]:
    up, down = product_shapes(model.layers[number])
    return min(up), min(down)


@pytest.mark.slow
def test_kills_change_nothing(tmp_path: Path) -> None:
    path = write_tiny_checkpoint("mixtral", tmp_path / "moe", num_hidden_layers=6)
    plan = make_plan(path, "svd-whitened")
    plan.save(tmp_path / "plan.json")
    apply_streamed(path, plan, tmp_path / "once", max_shard_bytes=100_000)
    command = ["apply", str(path), "--plan", str(tmp_path / "plan.json")]
    command += ["-o", str(tmp_path / "killed"), "--max-shard-gb", "1e-4"]

    done = subprocess.run(
        [
            sys.executable,
            str(KILLED_RUNS),
            *("0", "8", "60", f"{tmp_path}/killed.partial"),
            *command,
        ],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )

    assert done.returncode == 0, done.stderr
    resumed = json.loads(done.stdout.splitlines()[-1])
    assert len(resumed) == 9
    assert sum(resumed) > 4
    assert read_bytes(tmp_path / "killed") == read_bytes(tmp_path / "once")
    assert not list(tmp_path.glob("*.partial"))


def test_refusals_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tiny_checkpoint("nemotron_h", tmp_path / "moe")
    plan = keep_all(read_shape(path))
    layers = tuple(replace(layer, ranks=((33, 2),) * 8) for layer in plan.layers)
    plan = replace(plan, layers=layers, factors=Factors(method="svd"))
    before = sorted(tmp_path.rglob("*"))

    # Without a gate the first product has half as many rows.
    refuse(path, plan, tmp_path / "out", r"ranks of a matrix 32 x 64 must be in \[1, 32\]")
    layers = tuple(replace(layer, ranks=((4, 2),) * 8) for layer in plan.layers)
    plan = replace(plan, layers=layers)
    refuse(
        path,
        changed(plan, method="luck"),
        tmp_path / "out",
        "must be one of shared-basis, svd, svd-wh",
    )
    whitened = changed(plan, method="svd-whitened")
    refuse(path, whitened, tmp_path / "out", "must hold the tokens that it looks at")
    sample = EmbeddedSample.of([Window(line=1, start=0, ids=[3, VOCAB_SIZE])])
    refuse(path, changed(whitened, sample=sample), tmp_path / "out", r"in \[0, 96\), the mod")
    sample = EmbeddedSample.of(draw_windows())
    options = {"prior_tokens": "many"}
    wrong = changed(whitened, sample=sample, options=options)
    refuse(path, wrong, tmp_path / "out", "option prior_tokens of svd-whitened must be an int")
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: full)
    with pytest.raises(OutputError, match=r"must have .* free, got 1.0 kB"):
        apply_streamed(path, plan, tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before


def changed(plan: Plan, **entries: Any) -> Plan:
    assert plan.factors is not None
    return replace(plan, factors=replace(plan.factors, **entries))


def refuse(path: Path, plan: Plan, output: Path, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        apply_streamed(path, plan, output)
    with pytest.raises(PlanError, match=message):
        apply_plan(load_model(path), plan)
