r"""How much of a prompt's work in graphs for TensorRT follows k.

In a prompt every expert of such a graph multiplies as many rows as the busiest one has tokens
(see exporters/edgemoe_exporters/lowering/primitive/dispatch.py). For each cap of experts per
token this counts those rows, over the rows of a graph of --static-shapes, in pieces of a task's
text as long as an engine takes at once; and times prompts in onnxruntime on the CPU, which
tells what work there is, not how fast TensorRT is. Run it from the repository's root, with the
demo's model and a folder that benchmarks/reference_moe/corpus.py wrote::

    python -m benchmarks.adaptive_k.places demo/moe --tasks demo/domains --work places

Markdown goes to stdout, progress to stderr; --work keeps the bundles.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

import click
import numpy as np
import torch

from benchmarks.commands import Commands
from benchmarks.tables import write_table
from benchmarks.task_options import on_several_tasks
from edgemoe.calibrate.windows import cut_tasks
from edgemoe.models import limit_k, load_model, load_tokenizer
from edgemoe.models.hooks import observe
from edgemoe.tasks import TaskFile
from edgemoe_runtime import Session

if TYPE_CHECKING:
    from pathlib import Path

    from edgemoe.models.contract import MoeModel
    from edgemoe.models.layers.layer import MoeLayer
    from edgemoe.models.routing.routers import Routing

_PIECE = 256


def count_places(model: MoeModel, pieces: list[list[int]], cap: int) -> float:
    """Return the busiest expert's share of the tokens, in the mean over layers and pieces."""
    shares: list[float] = []

    def count(layer: MoeLayer, _: torch.Tensor, routing: Routing, __: object) -> None:
        used = routing.indices.flatten()
        loads = torch.bincount(used[used < layer.num_experts], minlength=layer.num_experts)
        shares.append(float(loads.max()) / len(routing.indices))

    with torch.inference_mode(), limit_k(model, cap), observe(model, count):
        for piece in pieces:
            model.model(input_ids=torch.tensor([piece]), use_cache=False)
    return statistics.mean(shares)


def time_prompt(session: Session, text: str, cap: int) -> float:
    """Return the seconds that reading a prompt takes."""
    session.set_k_cap(cap)
    return session.generate(text, max_new_tokens=1).prefill_seconds


@click.command()
@on_several_tasks
@click.option("--pieces", "count", default=4, show_default=True, help="Of each task.")
def main(
    model: Path, tasks: Path, names: tuple[str, ...], work: Path, count: int, threads: int
) -> None:
    """Count and time what graphs of MODEL do for a prompt."""
    torch.set_num_threads(threads)
    work.mkdir(parents=True, exist_ok=True)
    opened, tokenizer = load_model(model), load_tokenizer(model)
    pieces = {}
    for name in names:
        lines = TaskFile.load(name, tasks / f"{name}.test.jsonl")
        cut = cut_tasks(opened, [lines], tokenizer, max_tokens=count * _PIECE)
        ids = [token for window in cut.by_task[name] for token in window.ids]
        pieces[name] = [ids[at : at + _PIECE] for at in range(0, count * _PIECE, _PIECE)]
    caps = list(range(1, max(layer.top_k for layer in opened.layers) + 1))
    shares = {
        name: [count_places(opened, found, cap) for cap in caps]
        for name, found in pieces.items()
    }
    commands = Commands(work, threads)
    asked = ("--target", "tensorrt-rtx", "--precision", "fp32")
    commands.make("follows", "export", model, *asked)
    commands.make("static", "export", model, *asked, "--static-shapes")
    quotients: dict[int, list[float]] = {cap: [] for cap in caps}
    with (
        Session.open(work / "follows", threads=threads, adapt=False) as follows,
        Session.open(work / "static", threads=threads, adapt=False) as static,
    ):
        for piece in [piece for found in pieces.values() for piece in found]:
            click.echo("a piece", err=True)
            text = tokenizer.decode(piece)
            whole = time_prompt(static, text, caps[-1])
            for cap in caps:
                quotients[cap].append(time_prompt(follows, text, cap) / whole)
    heading = ["experts per token", *(f"rows, {name}" for name in names), "time of a prompt"]
    rows = [
        [
            f"{cap}",
            *(f"{shares[name][number]:.2f}" for name in names),
            f"{np.median(quotients[cap]):.2f}",
        ]
        for number, cap in enumerate(caps)
    ]
    write_table(heading, rows)


if __name__ == "__main__":
    main()
