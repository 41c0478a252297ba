"""Layers with a state: decode and prefill of bundles beside transformers eager, in one run.

    python -m benchmarks.hybrid_speed [--family qwen3_next] [--prompt-tokens 256] [--json FILE]

Random checkpoints of middle size (8 layers, every second one with attention, hidden size 512,
16 experts of which 2 run), exported for the CPU and opened by the runtime as a user would.
Every contestant answers one prompt in turn, again and again; the table shows medians, and how
many times as fast as transformers a bundle is. Without its CUDA kernels, transformers computes
these layers in its reference implementations.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import torch

from edgemoe.models.checkpoint import load_model
from edgemoe.models.decoder import cache_name
from edgemoe.models.tiny import write_tiny_checkpoint
from edgemoe_exporters.export import export_bundle
from edgemoe_exporters.request import ExportRequest
from edgemoe_runtime import Session

if TYPE_CHECKING:
    from collections.abc import Callable

_LAYERS, _HIDDEN, _HEADS = 8, 512, 8
_MIXED = ["linear_attention", "full_attention"] * (_LAYERS // 2)
_COMMON: dict[str, Any] = {
    "hidden_size": _HIDDEN,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": _HEADS,
    "num_key_value_heads": 2,
    "intermediate_size": 1024,
    "moe_intermediate_size": 256,
    "shared_expert_intermediate_size": 256,
    "shared_intermediate_size": 256,
    "num_experts": 16,
    "num_local_experts": 16,
    "max_position_embeddings": 2048,
}
_FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_next": {
        "layer_types": _MIXED,
        "head_dim": 64,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 8,
    },
    "granitemoehybrid": {
        "layer_types": _MIXED,
        "mamba_n_heads": 16,
        "mamba_d_head": 64,
        "mamba_d_state": 64,
        "mamba_chunk_size": 64,
    },
    "jamba": {"mamba_d_state": 16, "mamba_dt_rank": 32, "intermediate_size": 256},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * (_LAYERS // 2)},
}


class Eager:
    """The checkpoint in transformers."""

    def __init__(self, path: Path) -> None:
        self.model = load_model(path).model

    def answer(self, prompt: list[int], tokens: int) -> tuple[float, float]:
        """Answer greedily.

        Args:
            prompt: Token ids.
            tokens: How many to generate.

        Returns:
            Seconds until the first token, and seconds of each of the others.
        """
        name = cache_name(self.model)
        started = time.perf_counter()
        with torch.inference_mode():
            output = self.model(torch.tensor([prompt]), use_cache=True)
            first = time.perf_counter()
            for _ in range(tokens - 1):
                token = output.logits[:, -1:].argmax(-1)
                output = self.model(token, use_cache=True, **{name: output[name]})
        return first - started, (time.perf_counter() - first) / (tokens - 1)


class Bundle:
    """A bundle in the runtime."""

    def __init__(self, path: Path, threads: int) -> None:
        self.session = Session.open(path, threads=threads)

    def answer(self, prompt: list[int], tokens: int) -> tuple[float, float]:
        """Answer greedily; see `Eager.answer`."""
        text = " ".join(f"w{token}" for token in prompt)
        answer = self.session.generate(text, max_new_tokens=tokens)
        rest = answer.seconds - answer.prefill_seconds
        return answer.prefill_seconds, rest / max(1, answer.new_tokens - 1)


def measure(
    contestants: dict[str, Eager | Bundle], prompt: list[int], tokens: int, repeat: int
) -> dict[str, tuple[float, float]]:
    """Time all contestants in turn.

    Args:
        contestants: Name to what answers.
        prompt: Token ids.
        tokens: How many to generate.
        repeat: Rounds after one that does not count.

    Returns:
        Name to medians of both times, in milliseconds.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    for turn in range(repeat + 1):
        for name, contestant in contestants.items():
            spent = contestant.answer(prompt, tokens)
            if turn:
                times[name].append(spent)
    median: Callable[[list[float]], float] = statistics.median
    return {
        name: (1e3 * median([a for a, _ in rows]), 1e3 * median([b for _, b in rows]))
        for name, rows in times.items()
    }


@click.command()
@click.option("--family", "families", multiple=True, type=click.Choice(list(_FAMILIES)))
@click.option("--precision", "precisions", multiple=True, default=("fp32", "int4"))
@click.option("--prompt-tokens", default=256, show_default=True)
@click.option("--new-tokens", default=32, show_default=True)
@click.option("--repeat", default=5, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--json", "output", type=click.Path(dir_okay=False, path_type=Path))
def main(
    families: tuple[str, ...],
    precisions: tuple[str, ...],
    prompt_tokens: int,
    new_tokens: int,
    repeat: int,
    threads: int,
    output: Path | None,
) -> None:
    """Compare bundles of families whose layers keep a state with transformers eager."""
    torch.set_num_threads(threads)
    results: dict[str, dict[str, tuple[float, float]]] = {}
    for family in families or _FAMILIES:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            # So that no token ends an answer: nothing is compared but time.
            changes = {**_COMMON, **_FAMILIES[family], "eos_token_id": None}
            write_tiny_checkpoint(family, folder / "model", initializer_range=0.02, **changes)
            contestants: dict[str, Eager | Bundle] = {"transformers": Eager(folder / "model")}
            for precision in precisions:
                bundle = folder / precision
                export_bundle(
                    ExportRequest(
                        model=folder / "model",
                        output=bundle,
                        target="cpu",
                        precision=precision,
                    )
                )
                contestants[precision] = Bundle(bundle, threads)
            prompt = [3 + 7 * index % 90 for index in range(prompt_tokens)]
            results[family] = measure(contestants, prompt, new_tokens, repeat)
        click.echo(f"{family}")
        base = results[family]["transformers"]
        for name, (prefill, decode) in results[family].items():
            click.echo(
                f"  {name:14} prefill {prefill:8.1f} ms ({base[0] / prefill:5.2f} x)   "
                f"decode {decode:7.2f} ms ({base[1] / decode:5.2f} x)"
            )
    if output is not None:
        output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
