"""The pruning benchmark on a tiny random model, end to end."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from benchmarks.pruning import main


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = transformers.Glm4MoeConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        moe_intermediate_size=8,
        num_hidden_layers=2,
        first_k_dense_replace=0,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=6,
        n_shared_experts=1,
        num_experts_per_tok=2,
        initializer_range=0.3,
    )
    path = tmp_path / "moe"
    transformers.Glm4MoeForCausalLM(config).save_pretrained(path)
    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(path / "tokenizer.json"))
    return path


def write_tasks(folder: Path, *names: str) -> None:
    folder.mkdir()
    random = np.random.Generator(np.random.PCG64(0))
    for number, name in enumerate(names):
        for part in ("train", "test"):
            lines = random.integers(20 * number, 20 * number + 20, size=(6, 12))
            rows = [json.dumps({"text": " ".join(f"w{i}" for i in line)}) for line in lines]
            (folder / f"{name}.{part}.jsonl").write_text("\n".join(rows))


def test_tables_and_rows(checkpoint: Path, tmp_path: Path) -> None:
    write_tasks(tmp_path / "tasks", "a", "b", "c")
    table = tmp_path / "out.csv"
    arguments = [str(checkpoint), "--tasks", str(tmp_path / "tasks"), "--csv", str(table)]
    arguments += ["--stats", str(tmp_path / "stats"), "--keep-experts", "4"]
    arguments += ["--keep-experts", "6", "--seeds", "2", "--max-test-tokens", "40"]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "| 4 | uncurl | b |" in result.output
    assert "Own task better in" in result.output
    rows = list(csv.DictReader(table.read_text().splitlines()))
    # The whole model, and three methods by three tasks and two draws, at two counts.
    assert len(rows) == 3 + 2 * (3 * 3 + 2) * 3
    # 40 tokens are 4 lines, the last cut to 4 tokens; each line's first is not scored.
    assert {row["tokens"] for row in rows} == {"36"}
    for row in rows:
        low, value, high = (float(row[k]) for k in ("ci95_low", "perplexity", "ci95_high"))
        assert low <= value <= high
        if row["experts_kept"] == "6":
            # Keeping all experts changes nothing, whoever chooses.
            assert float(row["ratio_to_whole"]) == 1
    assert any(float(row["ratio_to_whole"]) != 1 for row in rows)
    first = result.stdout
    again = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert again.stdout == first


def test_impossible_runs_are_refused_before_they_start(
    checkpoint: Path, tmp_path: Path
) -> None:
    write_tasks(tmp_path / "tasks", "a")
    arguments = [str(checkpoint), "--tasks", str(tmp_path / "tasks")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert "two or more tasks" in result.output
    write_tasks(tmp_path / "more", "a", "b")
    arguments = [str(checkpoint), "--tasks", str(tmp_path / "more"), "--keep-experts", "1"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert "top_k=2, got 1" in result.output
