from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest
import torch
from click.testing import CliRunner
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

from edgemoe.cli import main

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from click.testing import Result

CODE = (
    "def add(first, second):\n    return first + second\n",
    "for name in sorted(names):\n    print(name)\n",
    "class Reader:\n    def read(self, path):\n        return path.read_text()\n",
    "if value is None:\n    raise ValueError('value must be given')\n",
)
PROSE = (
    "The spindle vibrates above its limit, so the bearing is checked first.\n",
    "Water that stands overnight in the tank is drained before the shift begins.\n",
    "Nobody had opened the cabinet since spring, and dust lay on every rail.\n",
    "When the belt slips, the counter still counts, and the day's figures are wrong.\n",
)


@pytest.fixture(scope="session")
def invoke() -> Callable[..., Result]:
    """A function from the command's arguments to its result, in this process."""

    def run(*arguments: object) -> Result:
        return CliRunner().invoke(main, [str(argument) for argument in arguments])

    return run


@pytest.fixture(scope="session")
def answer(invoke: Callable[..., Result]) -> Callable[..., dict[str, object]]:
    """Like ``invoke`` with ``--json``; the command must succeed."""

    def run(*arguments: object) -> dict[str, object]:
        result = invoke(*arguments, "--json")
        assert result.exit_code == 0, result.stderr
        found: dict[str, object] = json.loads(result.stdout)
        return found

    return run


@pytest.fixture(scope="session")
def road(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random MoE checkpoint, ``moe``, and task files of two tasks."""
    folder = tmp_path_factory.mktemp("road")
    for name, texts in {"code": CODE, "prose": PROSE}.items():
        lines = [texts[index % 4] * 4 + texts[(index + 1) % 4] for index in range(12)]
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": line}) + "\n" for line in lines)
        )
    (folder / "moe").mkdir()
    save_tokenizer(folder / "moe")
    config = Glm4MoeConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        partial_rotary_factor=1.0,
        max_position_embeddings=256,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_shared_experts=1,
        first_k_dense_replace=0,
        norm_topk_prob=False,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    Glm4MoeForCausalLM(config).save_pretrained(folder / "moe")
    return folder


def save_tokenizer(folder: Path) -> None:
    """Train a byte-level tokenizer on the tasks' text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*CODE, *PROSE], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))


@pytest.fixture(scope="session")
def bundle(road: Path, answer: Callable[..., dict[str, object]]) -> Path:
    """A bundle for both tasks, in float32."""
    path = road / "bundle"
    tasks = [f"--task={name}={road / name}.jsonl" for name in ("code", "prose")]
    answer("export", road / "moe", "-o", path, "--target", "cpu", "--precision", "fp32", *tasks)
    return path


@pytest.fixture
def copied_bundle(bundle: Path, tmp_path: Path) -> Path:
    """A copy of the bundle, to be spoilt."""
    return shutil.copytree(bundle, tmp_path / "copied")
