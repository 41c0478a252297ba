"""Does a constant in place of a lost expert pay? MoNE's replacement beside leaving it out.

MoNE (https://arxiv.org/abs/2507.00390) leaves the router as it is, and lets experts that are
gone answer with the mean of what they gave. They are those of the smallest ::

    ||std(f_j(x) | j chosen)||_2 * mean(gate_j | j chosen)

Whether that is worth a change of every graph is asked here before it is built: REAP's choice
and MoNE's, each with the experts left out (the router chooses among the others, as everywhere
else in edgemoe) and with constants in their place. Run it from the repository's root, with the
demo's model and a folder that benchmarks/reference_moe/corpus.py wrote::

    python -m benchmarks.compression.constants demo/moe --tasks demo/domains --work constants

Markdown goes to stdout, progress to stderr.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import click
import torch

from benchmarks.commands import Commands
from benchmarks.tables import show_drop, show_score, write_table
from benchmarks.task_options import on_one_task
from edgemoe.apply.in_memory import applied
from edgemoe.calibrate.mixture import mix
from edgemoe.calibrate.statistics import Statistics
from edgemoe.evaluate.evaluation import evaluate
from edgemoe.evaluate.torch_scorer import TorchScorer
from edgemoe.models import load_model, load_tokenizer
from edgemoe.models.hooks import observe
from edgemoe.oracle.oracle import inputs_of
from edgemoe.plans.plan import Plan
from edgemoe.prune.keep import count_kept
from edgemoe.prune.registry import make_plan
from edgemoe.prune.selection import keep_highest
from edgemoe.tasks import TaskFile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from edgemoe.calibrate.sample import Window
    from edgemoe.models import MoeModel
    from edgemoe.models.layers.layer import MoeLayer
    from edgemoe.models.routing.routers import Routing


class Moments:
    """What one layer's experts give for the tokens that choose them."""

    def __init__(self, experts: int, hidden: int) -> None:
        self._count = torch.zeros(experts, dtype=torch.float64)
        self._gates = torch.zeros(experts, dtype=torch.float64)
        self._sums = torch.zeros(experts, hidden, dtype=torch.float64)
        self._squares = torch.zeros(experts, hidden, dtype=torch.float64)

    def add(self, expert: int, outputs: torch.Tensor, gates: torch.Tensor) -> None:
        """Add tokens of one expert: outputs [n, hidden] without gates [n]."""
        self._count[expert] += len(outputs)
        self._gates[expert] += gates.double().sum()
        self._sums[expert] += outputs.double().sum(dim=0)
        self._squares[expert] += outputs.double().square().sum(dim=0)

    @property
    def means(self) -> torch.Tensor:
        """Mean outputs, float64 [experts, hidden]; 0 where no token chose the expert."""
        return self._sums / self._count.clamp_min(1)[:, None]

    @property
    def scores(self) -> NDArray[np.float64]:
        """MoNE's scores, float64 [experts]."""
        count = self._count.clamp_min(1)
        spread = (self._squares / count[:, None] - self.means.square()).clamp_min(0)
        return (spread.sum(dim=1).sqrt() * self._gates / count).numpy()


@torch.no_grad()
def measure(model: MoeModel, windows: Sequence[Window]) -> dict[int, Moments]:
    """Run the model on its calibration's tokens."""
    hidden = model.shape.hidden_size
    found = {layer.index: Moments(layer.num_experts, hidden) for layer in model.layers}

    def look(
        layer: MoeLayer,
        states: torch.Tensor,
        routing: Routing,
        run: Callable[[int, torch.Tensor], torch.Tensor],
    ) -> None:
        for expert in range(layer.num_experts):
            tokens, slots = torch.where(routing.indices == expert)
            if len(tokens):
                outputs = run(expert, states[tokens])
                found[layer.index].add(expert, outputs, routing.weights[tokens, slots])

    with observe(model, look):
        for window in windows:
            model.model(**inputs_of(window))
    return found


class StandIns:
    """Hooks of one layer that let constants answer for experts that are gone."""

    def __init__(self, gone: torch.Tensor, means: torch.Tensor) -> None:
        self._gone = gone
        self._constants = means.float() * gone[:, None]
        self._added: torch.Tensor

    def before(self, _: Any, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Silence the experts, and find what stands in for them."""
        hidden, indices, weights = arguments
        self._added = (weights[..., None] * self._constants[indices]).sum(dim=-2)
        return hidden, indices, weights * ~self._gone[indices]

    def after(self, _: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        """Add it."""
        return output + self._added.reshape(output.shape).to(output.dtype)


@contextlib.contextmanager
def replaced(model: MoeModel, plan: Plan, moments: dict[int, Moments]) -> Iterator[None]:
    """Let experts that a plan leaves out answer with their means."""
    with contextlib.ExitStack() as stack:
        for layer, kept in zip(model.layers, plan.layers, strict=True):
            gone = torch.ones(layer.num_experts, dtype=torch.bool)
            gone[[expert.members[0] for expert in kept.experts]] = False
            hooks = StandIns(gone, moments[layer.index].means)
            experts = layer.experts
            stack.callback(experts.register_forward_pre_hook(hooks.before).remove)
            stack.callback(experts.register_forward_hook(hooks.after).remove)
        yield


@click.command()
@on_one_task
@click.option("--keep", "keeps", type=float, multiple=True, default=(0.75, 0.5))
@click.option("--calibration-tokens", default=8192, show_default=True)
@click.option("--held-out-tokens", default=3072, show_default=True)
def main(
    model: Path,
    tasks: Path,
    task: str,
    work: Path,
    keeps: tuple[float, ...],
    calibration_tokens: int,
    held_out_tokens: int,
    threads: int,
) -> None:
    """Ask whether constants pay for MODEL."""
    commands = Commands(work, threads)
    lines = tasks / f"{task}.train.jsonl"
    statistics = Statistics.load(commands.calibrate(model, task, lines, calibration_tokens))
    opened, tokenizer = load_model(model), load_tokenizer(model)
    click.echo("measure what experts give", err=True)
    moments = measure(opened, mix(statistics, {task: 1.0}).windows)
    held_out = TaskFile.load(task, tasks / f"{task}.test.jsonl")

    def judge() -> Any:
        return evaluate(TorchScorer(opened), held_out, tokenizer, max_tokens=held_out_tokens)

    before = judge()
    rows = [["all", "", "", show_score(before), ""]]
    for keep in keeps:
        counts = count_kept(statistics.shape, keep=keep)
        layers = tuple(
            keep_highest(layer, moments[layer.layer].scores, count)
            for layer, count in zip(statistics.shape.layers, counts, strict=True)
        )
        plans = {
            "REAP": make_plan(statistics, task, "reap", counts),
            "MoNE": Plan(method="mone", layers=layers),
        }
        for name, plan in plans.items():
            click.echo(f"judge {name} at {keep:g}", err=True)
            with applied(opened, plan):
                left_out = judge()
            with replaced(opened, plan, moments):
                constant = judge()
            for way, score in (("left out", left_out), ("constants", constant)):
                drop = show_drop(before, score)
                rows.append([f"{keep:g}", name, way, show_score(score), drop])
    write_table(["keep", "chosen by", "the others", "perplexity [95%]", "rise [95%]"], rows)


if __name__ == "__main__":
    main()
