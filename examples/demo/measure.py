"""Size, quality and speed: dense, carved, and exported for two tasks."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

from edgemoe.disk import human_bytes
from edgemoe.evaluate.evaluation import evaluate
from edgemoe.evaluate.session_scorer import SessionScorer
from edgemoe.evaluate.subject import load_dense
from edgemoe.evaluate.torch_scorer import TorchScorer
from edgemoe.models import load_model, load_tokenizer
from edgemoe.models.checkpoint import Checkpoint
from edgemoe.models.decoder import cache_name
from edgemoe.tasks import TaskFile
from edgemoe_runtime import Session
from edgemoe_runtime.bundle.manifest_file import load_manifest

if TYPE_CHECKING:
    from pathlib import Path

    from edgemoe.evaluate.evaluation import Evaluation
    from edgemoe.evaluate.scorer import Scorer

TEST_TOKENS = 3_072
PROMPT_TOKENS = 256
NEW_TOKENS = 32
REPEAT = 3

Row = dict[str, Any]


def measure(dense: Path, moe: Path, bundle: Path, tasks: Path) -> list[Row]:
    """Judge all models on the tests of the bundle's tasks, and time them.

    Args:
        dense: Checkpoint before.
        moe: Checkpoint that was carved out of it.
        bundle: Bundle that was exported from that.
        tasks: Folder of `<task>.test.jsonl`.

    Returns:
        One row per model; JSON values.
    """
    manifest = load_manifest(bundle)
    tests = {name: TaskFile.load(name, tasks / f"{name}.test.jsonl") for name in manifest.tasks}
    rows = [
        _measure_checkpoint("dense, fp32", dense, tests),
        _measure_checkpoint("MoE, fp32", moe, tests),
    ]
    for name, entry in manifest.tasks.items():
        with Session.open(bundle, task=name) as session:
            limit = manifest.model.max_position_embeddings
            quality = _judge(SessionScorer(session, max_length=limit), moe, tests)
        label = f"bundle {manifest.precision}: {name}, {entry.experts_per_layer[0]} experts"
        speed = bench(bundle, name)
        rows.append(
            {
                "model": label,
                "bytes": manifest.size.shared_bytes + manifest.size.task_bytes[name],
                "quality": quality,
                "prefill_tokens_per_s": speed["prefill_tokens_per_s"],
                "decode_tokens_per_s": speed["decode_tokens_per_s"],
            }
        )
    rows.append({"model": "bundle: both tasks on disk", "bytes": manifest.size.total_bytes})
    return rows


def bench(
    bundle: Path,
    task: str,
    *,
    prompt_tokens: int = PROMPT_TOKENS,
    new_tokens: int = NEW_TOKENS,
    repeat: int = REPEAT,
) -> Row:
    """Return what `edgemoe bench` answers, run in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "edgemoe.cli",
        "bench",
        str(bundle),
        "--task",
        task,
        "--json",
    ]
    command += ["--prompt-tokens", str(prompt_tokens), "--new-tokens", str(new_tokens)]
    command += ["--repeat", str(repeat)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: Row = json.loads(done.stdout)
    return result


def time_eager(
    model: Any,
    *,
    prompt_tokens: int = PROMPT_TOKENS,
    new_tokens: int = NEW_TOKENS,
    repeat: int = REPEAT,
) -> Row:
    """Time a transformers model as `edgemoe bench` times a bundle.

    Args:
        model: A causal language model.
        prompt_tokens: Tokens of the prompt; any tokens, for time does not depend on them.
        new_tokens: Tokens to decode greedily, one at a time, with the KV cache.
        repeat: How many times, after one that is not counted.

    Returns:
        Medians of `prefill_tokens_per_s` and `decode_tokens_per_s`.
    """
    import torch

    name = cache_name(model)
    ids = torch.arange(1000, 1000 + prompt_tokens)[None]
    prefill, decode = [], []
    with torch.inference_mode():
        for _ in range(repeat + 1):
            started = time.perf_counter()
            out = model(ids, use_cache=True, logits_to_keep=1)
            read = time.perf_counter()
            for _ in range(new_tokens - 1):
                token = out.logits[:, -1:].argmax(-1)
                out = model(token, use_cache=True, **{name: out[name]})
            prefill.append(prompt_tokens / (read - started))
            decode.append((new_tokens - 1) / (time.perf_counter() - read))
    return {
        "prefill_tokens_per_s": statistics.median(prefill[1:]),
        "decode_tokens_per_s": statistics.median(decode[1:]),
    }


def show(rows: list[Row]) -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    names = list(rows[0]["quality"])
    table = Table(title="Size, perplexity on held-out text (95% interval), speed")
    table.add_column("model")
    for column in ("size", *names, "prefill tokens/s", "decode tokens/s"):
        table.add_column(column, justify="right")
    for row in rows:
        quality = row.get("quality", {})
        speeds = [row.get(f"{name}_tokens_per_s") for name in ("prefill", "decode")]
        table.add_row(
            row["model"],
            human_bytes(row["bytes"]),
            *(_score(quality[name]) if name in quality else "" for name in names),
            *("" if speed is None else f"{speed:.0f}" for speed in speeds),
        )
    Console(width=None if sys.stdout.isatty() else 132).print(table)


def _measure_checkpoint(label: str, path: Path, tests: dict[str, TaskFile]) -> Row:
    if Checkpoint(path).has_experts:
        model: Any = load_model(path).model
    else:
        model = load_dense(path)
    quality = _judge(TorchScorer(model), path, tests)
    speed = time_eager(model)
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    return {"model": label, "bytes": size, "quality": quality, **speed}


def _judge(scorer: Scorer, checkpoint: Path, tests: dict[str, TaskFile]) -> dict[str, Row]:
    tokenizer = load_tokenizer(checkpoint)
    scores: dict[str, Evaluation] = {
        name: evaluate(scorer, test, tokenizer, max_tokens=TEST_TOKENS)
        for name, test in tests.items()
    }
    return {name: score.to_dict() for name, score in scores.items()}


def _score(score: Row) -> str:
    low, high = score["ci95"]
    return f"{score['value']:.2f} [{low:.2f}, {high:.2f}]"
