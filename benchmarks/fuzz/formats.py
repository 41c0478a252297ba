"""The files that edgemoe reads, each with the commands that read all of it."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.fuzz.mutations import in_header, in_line, mutate_bytes, mutate_json

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    Mutation = Callable[[bytes, random.Random], bytes]

_WORDS = 96  # of the tiny models' vocabulary
_BOTH: tuple[Mutation, ...] = (mutate_bytes, mutate_json)
_HEADER: tuple[Mutation, ...] = (mutate_bytes, in_header(mutate_json))


@dataclass(frozen=True, kw_only=True)
class Format:
    """One file of a base directory that is damaged, and the commands that read it.

    Attributes:
        name: What the table calls it.
        file: Path in the base directory.
        mutations: What is done to it, each as likely.
        commands: Arguments of `edgemoe`; `{base}` is the copy of the base directory that has
            the damaged file, `{out}` a path that does not exist.
        sealed: Bundle directory whose manifest is told of the changed file, so that the hash
            does not end it all.
    """

    name: str
    file: str
    mutations: Sequence[Mutation] = _BOTH
    commands: Sequence[str]
    sealed: str | None = None


_EVALUATE = "evaluate {base}/moe --task t={base}/test.jsonl"
_RUN = "run {base}/bundle --prompt w1 --max-new-tokens 1"
FORMATS = (
    Format(
        name="config.json",
        file="moe/config.json",
        mutations=(mutate_json, mutate_json, mutate_bytes),
        commands=("inspect {base}/moe --json", _EVALUATE),
    ),
    Format(
        name="model.safetensors",
        file="moe/model.safetensors",
        mutations=_HEADER,
        commands=("inspect {base}/moe", _EVALUATE),
    ),
    Format(
        name="model.safetensors.index.json",
        file="sharded/model.safetensors.index.json",
        commands=("evaluate {base}/sharded --task t={base}/test.jsonl",),
    ),
    Format(name="tokenizer.json", file="moe/tokenizer.json", commands=(_EVALUATE,)),
    Format(
        name="edgemoe.json",
        file="ragged/edgemoe.json",
        commands=("inspect {base}/ragged", "evaluate {base}/ragged --task t={base}/test.jsonl"),
    ),
    Format(
        name="task file",
        file="test.jsonl",
        mutations=(mutate_bytes, in_line(mutate_json)),
        commands=(_EVALUATE,),
    ),
    Format(
        name="task file of choices",
        file="choice.jsonl",
        mutations=(mutate_bytes, in_line(mutate_json)),
        commands=("evaluate {base}/moe --task t={base}/choice.jsonl",),
    ),
    Format(
        name="statistics",
        file="stats",
        mutations=(in_header(mutate_json), in_header(mutate_json), mutate_bytes),
        commands=(
            "inspect {base}/stats",
            "prune {base}/moe --stats {base}/stats --task t --method reap --keep 0.75 -o {out}",
            "merge-stats {base}/stats {base}/more -o {out}",
        ),
    ),
    Format(
        name="plan",
        file="plan.json",
        mutations=(mutate_json, mutate_json, mutate_bytes),
        commands=(
            "inspect {base}/plan.json",
            "apply {base}/moe --plan {base}/plan.json -o {out}",
        ),
    ),
    Format(
        name="plan of factors",
        file="factors.json",
        mutations=(mutate_json, mutate_json, mutate_bytes),
        commands=(
            "inspect {base}/factors.json",
            "apply {base}/moe --plan {base}/factors.json -o {out}",
        ),
    ),
    Format(
        name="manifest.json",
        file="bundle/manifest.json",
        mutations=(mutate_json, mutate_json, mutate_bytes),
        commands=("inspect {base}/bundle", "verify {base}/bundle", _RUN),
    ),
    Format(
        name="graph of a bundle",
        file="bundle/model.onnx",
        mutations=(mutate_bytes,),
        commands=("verify {base}/bundle", _RUN),
    ),
    Format(
        name="weights of a bundle",
        file="bundle/model.onnx.data",
        mutations=(mutate_bytes,),
        commands=("verify {base}/bundle", _RUN),
    ),
    Format(
        name="tokenizer of a bundle",
        file="bundle/tokenizer.json",
        commands=("verify {base}/bundle", _RUN),
        sealed="bundle",
    ),
    Format(
        name="config of a bundle",
        file="bundle/config.json",
        commands=("inspect {base}/bundle", _RUN),
        sealed="bundle",
    ),
    Format(
        name="key of an engine",
        file="engine.json",
        commands=("inspect {base}/engine.json",),
    ),
    Format(
        name="report of a sweep",
        file="report/report.json",
        commands=("inspect {base}/report",),
    ),
)


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
    draw = random.Random(0)

    def text(words: int) -> str:
        return " ".join(f"w{draw.randrange(_WORDS)}" for _ in range(words))

    lines: list[dict[str, object]] = [{"text": text(30)} for _ in range(24)]
    choices: list[dict[str, object]] = [
        {"prompt": text(8), "choices": ["w5", "w7"], "answer": draw.randrange(2)}
        for _ in range(6)
    ]
    for name, rows in {
        "train": lines[:16],
        "test": lines[16:],
        "choice": choices,
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
        "export {base}/moe --target cpu --precision fp32 -o {base}/bundle",
        "sweep {base}/moe --task t={base}/train.jsonl --method reap --keep 0.5,1.0 "
        "--max-drop 0.5 --accept-weak-evidence -o {base}/report",
    ):
        run_command(command.format(base=folder))
    (folder / "engine.json").write_text(_engine_key(folder), encoding="utf-8")


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
