"""How an export grows with experts and layers: nodes, time, session load, memory.

Random checkpoints with a small hidden size, so that figures are about graphs, not weights:
64 experts in 24 layers, 128 experts in 4 layers, and a quarter of the former's layers to see
what grows faster than the model. Each is exported for both flavours, each in a process of its
own. For weights of a real size see `streaming.py`. Run it from the repository's root::

    python -m benchmarks.export_scale WORK_DIRECTORY
"""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from edgemoe_exporters.report import ExportReport

_VOCABULARY = 512
_HIDDEN = 64
_SHAPES = {"64 experts, 6 layers": (64, 6), "64 experts, 24 layers": (64, 24)}
_SHAPES["128 experts, 4 layers"] = (128, 4)
_TARGETS = {"cpu": ("fp32", "int4"), "jetson-orin": ("fp16",)}


@dataclass(frozen=True)
class Row:
    """What one export took.

    Attributes:
        shape: Of the model.
        target: Of the bundle.
        precision: Of the weights.
        nodes: Of the graph, branches included.
        trace_s: Seconds of the trace.
        export_s: Seconds of the whole export.
        load_s: Seconds until onnxruntime has opened the graph.
        peak_bytes: Largest resident set of the process.
        bundle_bytes: Size of the bundle.
    """

    shape: str
    target: str
    precision: str
    nodes: int
    trace_s: float
    export_s: float
    load_s: float
    peak_bytes: int
    bundle_bytes: int


def write_checkpoint(path: Path, experts: int, layers: int) -> None:
    """Write a random checkpoint.

    Args:
        path: Directory to make.
        experts: Routed experts of each layer.
        layers: Decoder layers.
    """
    import torch
    import transformers

    from benchmarks.random_checkpoint import write_word_tokenizer

    torch.manual_seed(0)
    config = transformers.Qwen2MoeConfig(
        vocab_size=_VOCABULARY,
        hidden_size=_HIDDEN,
        intermediate_size=_HIDDEN,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=_HIDDEN,
        num_experts=experts,
        num_experts_per_tok=4,
    )
    transformers.Qwen2MoeForCausalLM(config).save_pretrained(path)
    write_word_tokenizer(path, _VOCABULARY)


def export_timed(model: Path, output: Path, target: str, precision: str) -> dict[str, Any]:
    """Export, and open the graph.

    Args:
        model: Checkpoint directory.
        output: Bundle to write.
        target: Of the bundle.
        precision: Of the weights.

    Returns:
        The measured fields of `Row`.
    """
    import onnx
    import onnxruntime

    from edgemoe_exporters.export import export_bundle
    from edgemoe_exporters.request import ExportRequest

    stages: list[tuple[str, float]] = []
    begun = time.perf_counter()
    report: ExportReport = export_bundle(
        ExportRequest(model=model, output=output, target=target, precision=precision),
        on_stage=lambda text: stages.append((text, time.perf_counter())),
    )
    ended = time.perf_counter()
    starts = [moment for _, moment in stages] + [ended]
    traced = [i for i, (text, _) in enumerate(stages) if text == "trace the model"]
    for (text, _), start, stop in zip(stages, starts, starts[1:], strict=False):
        click.echo(f"  {text}: {stop - start:.1f} s", err=True)
    graph = output / "model.onnx"
    opened = time.perf_counter()
    onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    loaded = time.perf_counter()
    return {
        "nodes": count_nodes(onnx.load(str(graph), load_external_data=False).graph),
        "trace_s": sum(starts[i + 1] - starts[i] for i in traced),
        "export_s": ended - begun,
        "load_s": loaded - opened,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "bundle_bytes": report.size.total_bytes,
    }


def count_nodes(graph: Any) -> int:
    """Count the nodes of a graph and of the branches in it.

    Args:
        graph: An `onnx.GraphProto`.

    Returns:
        Their number.
    """
    return sum(
        1 + sum(count_nodes(a.g) for a in node.attribute if a.HasField("g"))
        for node in graph.node
    )


def to_table(rows: list[Row]) -> str:
    """Write a Markdown table.

    Args:
        rows: Its rows.

    Returns:
        The table.
    """
    head = (
        "| shape | target | precision | nodes | trace s | export s | session load s | peak "
        "RSS MB | bundle MB |\n|---|---|---|--:|--:|--:|--:|--:|--:|\n"
    )
    return head + "\n".join(
        f"| {row.shape} | {row.target} | {row.precision} | {row.nodes} | {row.trace_s:.1f} | "
        f"{row.export_s:.1f} | {row.load_s:.2f} | {row.peak_bytes / 1e6:.0f} | "
        f"{row.bundle_bytes / 1e6:.1f} |"
        for row in rows
    )


@click.command()
@click.argument("work", type=click.Path(path_type=Path))
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write rows here.")
@click.option("--one", nargs=3, help="Export WORK for TARGET in PRECISION to OUTPUT, here.")
def main(work: Path, json_path: Path | None, one: tuple[str, str, str] | None) -> None:
    """Measure exports of random checkpoints in WORK."""
    if one is not None:
        target, precision, output = one
        click.echo(json.dumps(export_timed(work, Path(output), target, precision)))
        return
    rows = []
    for shape, (experts, layers) in _SHAPES.items():
        model, bundle = work / "model", work / "bundle"
        try:
            write_checkpoint(model, experts, layers)
            for target, precisions in _TARGETS.items():
                for precision in precisions:
                    click.echo(f"{shape}, {target}, {precision}", err=True)
                    arguments = [str(model), "--one", target, precision, str(bundle)]
                    answer = subprocess.run(
                        [sys.executable, "-m", "benchmarks.export_scale", *arguments],
                        check=True,
                        stdout=subprocess.PIPE,
                    ).stdout
                    rows.append(Row(shape, target, precision, **json.loads(answer)))
                    shutil.rmtree(bundle)
        finally:
            shutil.rmtree(model, ignore_errors=True)
            shutil.rmtree(bundle, ignore_errors=True)
    click.echo(to_table(rows))
    if json_path is not None:
        json_path.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
