"""The files that edgemoe reads, each with the commands that read all of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.fuzz.mutations import (
    in_entry,
    in_header,
    in_line,
    mutate_bytes,
    mutate_json,
)

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Sequence

    Mutation = Callable[[bytes, random.Random], bytes]

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
_CHAT = "evaluate {base}/chat --task t={base}/chat.jsonl"
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
        name="task file of messages",
        file="chat.jsonl",
        mutations=(mutate_bytes, in_line(mutate_json)),
        commands=(_CHAT,),
    ),
    Format(name="tokenizer_config.json", file="chat/tokenizer_config.json", commands=(_CHAT,)),
    Format(
        name="chat_template.jinja",
        file="chat/chat_template.jinja",
        mutations=(mutate_bytes,),
        commands=(_CHAT,),
    ),
    Format(
        name="k_policy.json",
        file="adaptive/k_policy.json",
        mutations=(mutate_json, mutate_json, mutate_bytes),
        commands=(
            "inspect {base}/adaptive",
            "evaluate {base}/adaptive --task t={base}/test.jsonl",
        ),
    ),
    Format(
        name="FP8 weights",
        file="fp8/model.safetensors",
        mutations=_HEADER,
        commands=("inspect {base}/fp8", "evaluate {base}/fp8 --task t={base}/test.jsonl"),
    ),
    Format(
        name="config.json of FP8 weights",
        file="fp8/config.json",
        mutations=(in_entry("quantization_config", mutate_json),),
        commands=("inspect {base}/fp8", "evaluate {base}/fp8 --task t={base}/test.jsonl"),
    ),
    Format(
        name="GPTQ weights",
        file="gptq/model.safetensors",
        mutations=_HEADER,
        commands=("inspect {base}/gptq", "evaluate {base}/gptq --task t={base}/test.jsonl"),
    ),
    Format(
        name="quantize_config.json",
        file="gptq/quantize_config.json",
        commands=("inspect {base}/gptq", "evaluate {base}/gptq --task t={base}/test.jsonl"),
    ),
    Format(
        name="GGUF file",
        file="moe.gguf",
        mutations=(mutate_bytes,),
        commands=(
            "inspect {base}/moe.gguf",
            "evaluate {base}/moe.gguf --task t={base}/test.jsonl",
        ),
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
