"""Collecting from real (tiny, random) models of every family."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgemoe.calibrate.collect import collect
from edgemoe.calibrate.statistics import Statistics, merge
from edgemoe.errors import StatisticsError, TaskFileError
from edgemoe.models import load_model, load_tokenizer
from edgemoe.prune.registry import make_plan
from edgemoe.tasks import TaskFile

FAMILIES = ("glm4_moe", "mixtral", "qwen2_moe")


def write_task(folder: Path, name: str, rows: list[dict[str, object]]) -> TaskFile:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TaskFile.load(name, path)


def words(seed: int, count: int) -> str:
    numbers = np.random.Generator(np.random.PCG64(seed)).integers(0, 96, size=count)
    return " ".join(f"w{number}" for number in numbers)


def texts(*lengths: int) -> list[dict[str, object]]:
    return [{"text": words(seed, length)} for seed, length in enumerate(lengths)]


def assert_same_sums(left: Statistics, right: Statistics) -> None:
    assert left.tasks.keys() == right.tasks.keys()
    for name, task in left.tasks.items():
        for layer, sums in task.layers.items():
            for key, value in sums.to_arrays().items():
                other = right.tasks[name].layers[layer].to_arrays()[key]
                assert value.tobytes() == other.tobytes(), (name, layer, key)


@pytest.mark.parametrize("family", FAMILIES)
def test_sums_equal_loops_over_the_blocks_own_outputs(
    make_checkpoint: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    path = make_checkpoint(family)
    model, tokenizer = load_model(path), load_tokenizer(path)
    task = write_task(tmp_path, "t", texts(7, 5))
    statistics = collect(model, [task], tokenizer)

    # Capture what transformers' own modules receive and return, without the kit's hooks.
    seen: dict[int, list[tuple[torch.Tensor, ...]]] = {
        layer.index: [] for layer in model.layers
    }
    logits: dict[int, list[torch.Tensor]] = {layer.index: [] for layer in model.layers}
    for layer in model.layers:
        layer.experts.register_forward_hook(
            lambda _, arguments, __, index=layer.index: seen[index].append(arguments)
        )
        layer.router.register_forward_hook(
            lambda _, arguments, __, layer=layer: logits[layer.index].append(
                arguments[0].reshape(-1, layer.hidden_size) @ layer.router_weight.T
            )
        )
    with torch.inference_mode():
        for record in task.records:
            ids = tokenizer.encode(record.calibration_text).ids
            model.model(input_ids=torch.tensor([ids]))
    for layer in model.layers:
        gate_norm, count, norm = np.zeros(8), np.zeros(8), np.zeros(8)
        for hidden, indices, weights in seen[layer.index]:
            for t in range(len(hidden)):
                for s in range(3):
                    j = int(indices[t, s])
                    gate, up = (layer.gate_up[j] @ hidden[t]).chunk(2)
                    output = layer.down[j] @ (torch.nn.functional.silu(gate) * up)
                    length = float(output.double().norm())
                    count[j] += 1
                    norm[j] += length
                    gate_norm[j] += float(weights[t, s] / weights[t].sum()) * length
        sums = statistics.task("t").layers[layer.index]
        assert (sums.count == count).all()
        np.testing.assert_allclose(sums.norm, norm, rtol=1e-5)
        np.testing.assert_allclose(sums.gate_norm, gate_norm, rtol=1e-5)
        stacked = torch.cat(logits[layer.index]).double().numpy()
        np.testing.assert_allclose(sums.logit_gram, stacked.T @ stacked, rtol=1e-4, atol=1e-4)
        assert float(sums.tokens) == 12


@pytest.mark.parametrize("max_tokens", [None, 40])
def test_shards_and_split_files_merge_to_the_whole(
    make_checkpoint: Callable[..., Path], tmp_path: Path, max_tokens: int | None
) -> None:
    path = make_checkpoint("glm4_moe")
    model, tokenizer = load_model(path), load_tokenizer(path)
    rows = texts(7, 19, 1, 12, 30)
    task = write_task(tmp_path, "t", rows)
    whole = collect(model, [task], tokenizer, sequence_length=8, max_tokens=max_tokens)
    shards = [
        collect(
            model, [task], tokenizer, sequence_length=8, max_tokens=max_tokens, shard=(index, 3)
        )
        for index in (2, 0, 1)
    ]
    merged = merge(*shards)
    assert merged.task("t").tokens == whole.task("t").tokens == (max_tokens or 69)
    assert merged.sha256 == whole.sha256
    if max_tokens is None:
        parts = [
            collect(model, [write_task(tmp_path, "t", half)], tokenizer, sequence_length=8)
            for half in (rows[:2], rows[2:])
        ]
        assert_same_sums(merge(*parts), whole)


def test_a_shard_without_lines_of_one_task_adds_nothing(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    path = make_checkpoint("mixtral")
    model, tokenizer = load_model(path), load_tokenizer(path)
    tasks = [
        write_task(tmp_path, "long", texts(9, 14)),
        write_task(tmp_path, "short", texts(7)),
    ]
    shards = [collect(model, tasks, tokenizer, shard=(index, 2)) for index in range(2)]
    assert [shard.task("short").tokens for shard in shards] == [7, 0]
    assert merge(*shards).sha256 == collect(model, tasks, tokenizer).sha256
    counts = (model.layers[0].num_experts,) * len(model.layers)
    with pytest.raises(StatisticsError, match="got none of 'short'"):
        make_plan(shards[1], "short", "reap", counts)


def test_two_runs_give_the_same_bytes(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    path = make_checkpoint("qwen2_moe")
    task = write_task(tmp_path, "t", texts(9, 14))
    runs = [collect(load_model(path), [task], load_tokenizer(path)) for _ in range(2)]
    assert runs[0].sha256 == runs[1].sha256


def test_max_tokens_is_exact_and_kinds_are_read_whole(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    path = make_checkpoint("mixtral")
    model, tokenizer = load_model(path), load_tokenizer(path)
    task = write_task(tmp_path, "t", texts(9, 14, 3))
    for asked, lines in ((1, 1), (9, 1), (10, 2), (25, 3), (26, 3), (1000, 3)):
        found = collect(model, [task], tokenizer, max_tokens=asked).task("t")
        assert found.tokens == min(asked, 26)
        assert found.sources[0].lines == lines
        assert {float(sums.tokens) for sums in found.layers.values()} == {float(found.tokens)}
        assert {sums.count.sum() for sums in found.layers.values()} == {found.tokens * 3.0}
    rows: list[dict[str, object]] = [
        {"prompt": "w1 w2", "choices": [" w3", " w4 w5"], "answer": 1},
        {"prompt": "w1 w2", "completion": " w4 w5"},
        {"text": "w1 w2 w4 w5"},
    ]
    kinds = collect(
        model, [write_task(tmp_path, f"k{i}", [row]) for i, row in enumerate(rows)], tokenizer
    )
    for name in ("k1", "k2"):
        for layer, sums in kinds.task(name).layers.items():
            assert (sums.gate_norm == kinds.task("k0").layers[layer].gate_norm).all()
    refused: list[tuple[dict[str, Any], str]] = [
        ({"max_tokens": 0}, "max_tokens must be"),
        ({"sequence_length": 0}, "sequence_length must be"),
        ({"shard": (2, 2)}, "index must be"),
        ({"shard": (3, 4)}, "must have a token"),
    ]
    for arguments, rule in refused:
        with pytest.raises(TaskFileError, match=rule):
            collect(model, [task], tokenizer, **arguments)
