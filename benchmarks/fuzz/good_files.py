"""One good file of each format, to be damaged.

Quantised weights and GGUF files are written as the tests write them.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    import torch

_WORDS = 96  # of the tiny models' vocabulary


def make_base(folder: Path) -> None:
    """Write one good file of each format.

    Args:
        folder: A new directory.

    Raises:
        RuntimeError: A command failed on good files.
    """
    from edgemoe.models.tiny import tiny_config, tiny_model, write_tiny_checkpoint

    folder.mkdir()
    write_tiny_checkpoint("glm4_moe", folder / "moe")
    tiny_model(tiny_config("qwen2_moe")).save_pretrained(
        folder / "sharded", max_shard_size="200KB"
    )
    shutil.copy(folder / "moe" / "tokenizer.json", folder / "sharded")
    _write_chat(folder)
    _write_quantised(folder)
    draw = random.Random(0)

    def text(words: int) -> str:
        return " ".join(f"w{draw.randrange(_WORDS)}" for _ in range(words))

    lines: list[dict[str, object]] = [{"text": text(30)} for _ in range(24)]
    choices: list[dict[str, object]] = [
        {"prompt": text(8), "choices": ["w5", "w7"], "answer": draw.randrange(2)}
        for _ in range(6)
    ]
    chats: list[dict[str, object]] = [
        {
            "messages": [
                {"role": "user", "content": text(8)},
                {"role": "assistant", "content": text(2)},
            ]
        }
        for _ in range(6)
    ]
    for name, rows in {
        "train": lines[:16],
        "test": lines[16:],
        "choice": choices,
        "chat": chats,
    }.items():
        content = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(content, encoding="utf-8")
    for command in (
        "calibrate {base}/moe --task t={base}/train.jsonl -o {base}/stats",
        "calibrate {base}/moe --task t={base}/test.jsonl -o {base}/more",
        "prune {base}/moe --stats {base}/stats --task t --method reap --keep 0.5 "
        "-o {base}/plan.json",
        "decompose {base}/moe --stats {base}/stats --task t --method svd --param-ratio 0.6 "
        "-o {base}/factors.json",
        "prune {base}/moe --stats {base}/stats --task t --method moe-i2 --keep 0.7 "
        "-o {base}/uneven.json",
        "apply {base}/moe --plan {base}/uneven.json -o {base}/ragged",
        "allocate {base}/moe --task t={base}/train.jsonl --policy top-p --mean-k 1.5 "
        "-o {base}/policy.json",
        "apply {base}/moe --plan {base}/policy.json -o {base}/adaptive",
        "export {base}/moe --target cpu --precision fp32 -o {base}/bundle",
        "sweep {base}/moe --task t={base}/train.jsonl --method reap --keep 0.5,1.0 "
        "--max-drop 0.5 --accept-weak-evidence -o {base}/report",
    ):
        run_command(command.format(base=folder))
    (folder / "engine.json").write_text(_engine_key(folder), encoding="utf-8")


def _write_chat(folder: Path) -> None:
    shutil.copytree(folder / "moe", folder / "chat")
    (folder / "chat" / "chat_template.jinja").write_text(
        "{%- for message in messages -%}\n{{ message.role }} {{ message.content }}\n"
        "{%- endfor -%}{% if add_generation_prompt %} assistant {% endif %}",
        encoding="utf-8",
    )
    told = {"bos_token": "w1", "eos_token": "w2", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "chat" / "tokenizer_config.json").write_text(json.dumps(told), encoding="utf-8")


def _write_quantised(folder: Path) -> None:
    from tests.edgemoe.models.gguf.conftest import make_source
    from tests.edgemoe.models.gguf.writing import write_gguf
    from tests.edgemoe.models.quantised.storing import fp8_parts, write_both
    from tests.edgemoe.models.quantised.test_packed_columns import fits, store

    block = 16

    def by_block(name: str, weight: torch.Tensor) -> Any:
        shape = tuple(-(-size // block) for size in weight.shape)
        parts, scale = fp8_parts(name, weight, shape)
        return {**parts, f"{name}_scale_inv": scale}, weight

    fp8 = {"quant_method": "fp8", "weight_block_size": [block, block]}
    gptq = {"bits": 4, "group_size": block, "desc_act": False}
    made = folder / "made"
    path, _ = write_both("qwen3_moe", made / "fp8", by_block, fp8)
    path.rename(folder / "fp8")
    told = "quantize_config.json"
    path, _ = write_both("mixtral", made / "gptq", store, gptq, beside=told, chosen=fits)
    path.rename(folder / "gptq")
    make_source("qwen3_moe", made / "gguf")
    write_gguf(made / "gguf", folder / "moe.gguf")
    shutil.rmtree(made)


def run_command(command: str) -> None:
    """Run a command on good files.

    Args:
        command: Arguments of `edgemoe`.

    Raises:
        RuntimeError: It failed.
    """
    import subprocess
    import sys

    ran = subprocess.run(
        [sys.executable, "-m", "edgemoe.cli", *command.split()],
        capture_output=True,
        text=True,
        check=False,
    )
    if ran.returncode:
        raise RuntimeError(f"edgemoe {command} failed: {ran.stderr[-500:]}")


def _engine_key(folder: Path) -> str:
    """Write a key as `edgemoe compile` does, of a graph that was never compiled."""
    from edgemoe_runtime.bundle.engine_cache import EngineKey

    graph = (folder / "bundle" / "model.onnx").read_bytes()
    return EngineKey(
        task="model",
        precision="fp32",
        graph_sha256=hashlib.sha256(graph).hexdigest(),
        engine_sha256=hashlib.sha256(b"x").hexdigest(),
        engine_size=1,
        package="tensorrt_rtx",
        package_version="1.7.1",
        compute_capability=89,
        shapes={"input_ids": ((1, 1), (1, 8), (1, 64))},
        flags={"strongly_typed": True},
    ).dumps()
