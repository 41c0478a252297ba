"""Decode and prefill of exported graphs against transformers eager, in one run.

    python -m benchmarks.graph_speed MODEL [--precision fp32 --precision int4] [--json FILE]

Every contestant does one prefill and one decode step in turn, again and again, so that what
else the machine does falls on all of them alike; the table shows medians. Decoding starts
after the prompt and keeps the cache in one buffer that the graph reads and writes in place.
Graphs are saved alone here, with equal tensors as often as they occur; a bundle has them once.
CPU time is that of the whole process, so it tells work from waiting for a busy machine.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import onnx_ir
import onnxruntime
import torch

from edgemoe.models.checkpoint import load_model
from edgemoe.models.decoder import cache_name
from edgemoe_exporters.lowering import onnxruntime as lower_ort
from edgemoe_exporters.tracing.trace import trace

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgemoe.models.contract import MoeModel

_SLOTS = 1024


class Graph:
    """An exported graph in onnxruntime, its cache bound in place."""

    def __init__(self, path: Path, threads: int, layers: int) -> None:
        started = time.perf_counter()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"]
        )
        self.load_s = time.perf_counter() - started
        self.caps = np.full(layers, 1 << 30, dtype=np.int64)
        self.binding = self.session.io_binding()
        for value in self.session.get_inputs():
            if not value.name.startswith("past_key_values."):
                continue
            shape = (1, value.shape[1], _SLOTS, value.shape[3])
            dtype = np.float16 if "float16" in value.type else np.float32
            cache = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype))
            self.binding.bind_ortvalue_input(value.name, cache)
            present = value.name.replace("past_key_values", "present")
            self.binding.bind_ortvalue_output(present, cache)

    def run(self, ids: np.ndarray[Any, Any], past: int) -> None:
        """Read tokens after `past` others.

        Args:
            ids: int64 `[1, tokens]`.
            past: Tokens in the cache.
        """
        total = past + ids.shape[1]
        self.binding.bind_cpu_input("input_ids", ids)
        self.binding.bind_cpu_input("attention_mask", np.ones((1, total), dtype=np.int64))
        self.binding.bind_cpu_input("position_ids", np.arange(past, total)[None])
        self.binding.bind_cpu_input("k_cap", self.caps)
        self.binding.bind_output("logits", "cpu")
        self.session.run_with_iobinding(self.binding)


class Eager:
    """The model in transformers."""

    load_s = 0.0

    def __init__(self, model: MoeModel) -> None:
        self.model = model.model
        self.cache: Any = None

    def run(self, ids: np.ndarray[Any, Any], past: int) -> None:
        """Read tokens after `past` others.

        Args:
            ids: int64 `[1, tokens]`.
            past: Tokens in the cache; 0 begins a new text.
        """
        with torch.inference_mode():
            cache = None if past == 0 else self.cache
            name = cache_name(self.model)
            output = self.model(torch.from_numpy(ids), use_cache=True, **{name: cache})
            self.cache = output[name]


def measure(
    contestants: dict[str, Graph | Eager], prompt: int, steps: int, repeat: int
) -> dict[str, dict[str, float]]:
    """Time all contestants in turn.

    Args:
        contestants: Name to what runs.
        prompt: Tokens of the prompt.
        steps: Decode steps after each prompt.
        repeat: Rounds after one that does not count.

    Returns:
        Name to medians, in milliseconds.
    """
    rng = np.random.default_rng(0)
    ids = rng.integers(5, 1000, (1, prompt))
    times: dict[str, dict[str, list[float]]] = {
        name: {"prefill": [], "decode": [], "prefill_cpu": [], "decode_cpu": []}
        for name in contestants
    }
    for turn in range(repeat + 1):
        for name, contestant in contestants.items():
            rows = times[name]
            spent = [_time(lambda: contestant.run(ids, 0))]  # noqa: B023 - called at once
            spent += [
                _time(lambda: contestant.run(ids[:, :1], prompt + step))  # noqa: B023 - same
                for step in range(steps)
            ]
            if turn == 0:
                continue
            rows["prefill"].append(spent[0][0])
            rows["prefill_cpu"].append(spent[0][1])
            rows["decode"] += [wall for wall, _ in spent[1:]]
            rows["decode_cpu"] += [cpu for _, cpu in spent[1:]]
    return {
        name: {key: 1e3 * statistics.median(values) for key, values in rows.items()}
        for name, rows in times.items()
    }


def _time(action: Callable[[], None]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    action()
    return time.perf_counter() - wall, time.process_time() - cpu


@click.command()
@click.argument("model", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--precision", "precisions", multiple=True, default=("fp32", "int4"))
@click.option("--prompt-tokens", default=64, show_default=True)
@click.option("--new-tokens", default=16, show_default=True)
@click.option("--repeat", default=7, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--json", "output", type=click.Path(dir_okay=False, path_type=Path))
def main(
    model: Path,
    precisions: tuple[str, ...],
    prompt_tokens: int,
    new_tokens: int,
    repeat: int,
    threads: int,
    output: Path | None,
) -> None:
    """Compare the graphs of MODEL with transformers eager."""
    torch.set_num_threads(threads)
    loaded = load_model(model)
    traced = trace(loaded)
    contestants: dict[str, Graph | Eager] = {"transformers fp32": Eager(loaded)}
    sizes: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        for precision in precisions:
            path = Path(folder, f"{precision}.onnx")
            lowered = lower_ort.lower(traced, precision)
            onnx_ir.save(lowered, path, external_data=f"{precision}.data")
            name = f"onnxruntime {precision}"
            contestants[name] = Graph(path, threads, len(loaded.layers))
            files = path.parent.glob(f"{precision}.*")
            sizes[name] = sum(file.stat().st_size for file in files)
        results = measure(contestants, prompt_tokens, new_tokens, repeat)
    click.echo(
        f"{'':20} {'prefill ms':>11} {'(cpu)':>8} {'decode ms':>10} {'(cpu)':>8} "
        f"{'load s':>7} {'MB':>7}"
    )
    for name, row in results.items():
        click.echo(
            f"{name:20} {row['prefill']:11.1f} {row['prefill_cpu']:8.1f} {row['decode']:10.2f} "
            f"{row['decode_cpu']:8.2f} {contestants[name].load_s:7.2f} "
            f"{sizes.get(name, 0) / 1e6:7.1f}"
        )
    if output is not None:
        output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
