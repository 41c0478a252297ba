"""Which experts should a task keep? Perplexity by method and by the task that chose.

For each number of experts kept per layer and each method, experts are chosen by the training
text of every task, and every choice is judged on the test text of every task. `random` draws
them by several seeds instead, the same draw for all tasks. Intervals are 95%, by a bootstrap
over lines (1000 resamples, seed 0); ratios are paired: numerator and denominator score the
same lines.

    python -m benchmarks.pruning demo/moe --tasks demo/tasks
    python -m benchmarks.pruning demo/moe --tasks demo/tasks --only bible --only code \
        --keep-experts 12 --method reap --max-test-tokens 1000 --csv pruning.csv

The folder of --tasks holds NAME.train.jsonl and NAME.test.jsonl for each task. With the
defaults and three tasks, 24 choices are judged on 3 x --max-test-tokens tokens each: about 8
minutes for the reference model on two cores. --stats keeps the calibration for the next run.
Markdown goes to stdout, progress to stderr, and --csv writes one row per cell.
"""

from __future__ import annotations

import contextlib
import csv
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np

from edgemoe.apply.in_memory import apply_plan
from edgemoe.calibrate.collect import collect
from edgemoe.calibrate.statistics import Statistics
from edgemoe.errors import EdgemoeError
from edgemoe.evaluate.evaluation import Evaluation, evaluate
from edgemoe.evaluate.intervals import bootstrap_perplexity
from edgemoe.evaluate.torch_scorer import TorchScorer
from edgemoe.models import load_model, load_tokenizer
from edgemoe.models.saving import set_expert_counts
from edgemoe.prune.keep import count_kept
from edgemoe.prune.registry import METHODS, make_plan
from edgemoe.staging import staged_file
from edgemoe.tasks import TaskFile

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tokenizers import Tokenizer

    from edgemoe.models import MoeModel
    from edgemoe.plans.plan import Plan

DRAWN = "random"
Interval = tuple[float, float, float]

_COLUMNS = (
    "experts_kept",
    "method",
    "chosen_by",
    "task",
    "own",
    "perplexity",
    "ci95_low",
    "ci95_high",
    "tokens",
    "lines",
    "ratio_to_whole",
    "ratio_low",
    "ratio_high",
)


@dataclass(frozen=True)
class Choice:
    """How experts were chosen; `chooser` is a task, or a seed of the random draw."""

    keep: int
    method: str
    chooser: str


Cells = dict[tuple[Choice, str], Evaluation]


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--tasks", type=click.Path(path_type=Path), required=True, help="Folder.")
@click.option("--only", multiple=True, help="Task to use; repeatable; all by default.")
@click.option("--keep-experts", "keeps", type=int, multiple=True, default=(12, 8))
@click.option(
    "--method",
    "methods",
    multiple=True,
    type=click.Choice([name for name, method in METHODS.items() if not method.prunes_width]),
    default=("reap", "frequency", "uncurl", DRAWN),
)
@click.option("--seeds", type=click.IntRange(1), default=3, help="Random draws.")
@click.option("--max-train-tokens", type=click.IntRange(1), default=8000)
@click.option("--max-test-tokens", type=click.IntRange(2), default=2000)
@click.option("--stats", type=click.Path(path_type=Path), help="Read, or written where absent.")
@click.option("--csv", "table", type=click.Path(path_type=Path), help="One row per cell.")
def main(
    model: Path,
    tasks: Path,
    only: tuple[str, ...],
    keeps: tuple[int, ...],
    methods: tuple[str, ...],
    seeds: int,
    max_train_tokens: int,
    max_test_tokens: int,
    stats: Path | None,
    table: Path | None,
) -> None:
    """Compare pruning methods and choosing tasks on MODEL."""
    try:
        train, test = load_task_folder(tasks, only)
        opened, tokenizer = load_model(model), load_tokenizer(model)
        # A count below top_k must not be found after minutes of calibration.
        counts = {keep: count_kept(opened.shape, keep_experts=keep) for keep in keeps}
        statistics = calibrate(opened, train, tokenizer, max_train_tokens, stats)
        choices = [
            Choice(keep, method, chooser)
            for keep in keeps
            for method in methods
            for chooser in ([f"seed {s}" for s in range(seeds)] if method == DRAWN else train)
        ]
        judge = Judge(tokenizer, test, max_test_tokens)
        say(f"judging the whole model and {len(choices)} choices on {len(test)} tasks")
        whole = judge(opened)
        cells: Cells = {}
        for number, choice in enumerate(choices, start=1):
            started = time.monotonic()
            with pruned(opened, plan_choice(statistics, choice, counts[choice.keep])) as small:
                cells.update({(choice, name): score for name, score in judge(small).items()})
            say(f"{number}/{len(choices)} {choice} {time.monotonic() - started:.0f} s")
        print(render(opened, statistics, whole, choices, cells, list(test)))
        if table is not None:
            write_csv(table, whole, cells)
    except EdgemoeError as error:
        raise click.ClickException(str(error)) from error


@dataclass(frozen=True)
class Judge:
    """Scores a model on the test text of every task."""

    tokenizer: Tokenizer
    tasks: dict[str, TaskFile]
    max_tokens: int

    def __call__(self, model: MoeModel) -> dict[str, Evaluation]:
        """Return an evaluation per task."""
        scorer = TorchScorer(model)
        return {
            name: evaluate(scorer, task, self.tokenizer, max_tokens=self.max_tokens)
            for name, task in self.tasks.items()
        }


def load_task_folder(
    folder: Path, only: Sequence[str]
) -> tuple[dict[str, TaskFile], dict[str, TaskFile]]:
    """Load the training and the test file of each task."""
    names = list(only) or sorted(
        path.name.removesuffix(".train.jsonl") for path in folder.glob("*.train.jsonl")
    )
    if len(names) < 2:
        raise EdgemoeError(
            f"there must be two or more tasks to compare, got {names} in {folder}. Put "
            "NAME.train.jsonl and NAME.test.jsonl there."
        )
    train, test = (
        {name: TaskFile.load(name, folder / f"{name}.{part}.jsonl") for name in names}
        for part in ("train", "test")
    )
    return train, test


def calibrate(
    model: MoeModel,
    train: dict[str, TaskFile],
    tokenizer: Tokenizer,
    max_tokens: int,
    path: Path | None,
) -> Statistics:
    """Measure the tasks, or read what an earlier run measured."""
    if path is not None and path.exists():
        statistics = Statistics.load(path)
        if statistics.checkpoint_sha256 != model.sha256 or not set(train) <= set(
            statistics.tasks
        ):
            raise EdgemoeError(
                f"{path} must be statistics of this checkpoint and of {sorted(train)}. Delete "
                "the file to measure again."
            )
        return statistics
    say(f"calibrating {len(train)} tasks on up to {max_tokens} tokens each")
    statistics = collect(model, list(train.values()), tokenizer, max_tokens=max_tokens)
    if path is not None:
        statistics.save(path)
    return statistics


def plan_choice(statistics: Statistics, choice: Choice, counts: Sequence[int]) -> Plan:
    """Make the plan of a choice."""
    if choice.method == DRAWN:
        task, seed = next(iter(statistics.tasks)), int(choice.chooser.removeprefix("seed "))
    else:
        task, seed = choice.chooser, 0
    return make_plan(statistics, task, choice.method, counts, seed=seed)


@contextlib.contextmanager
def pruned(model: MoeModel, plan: Plan) -> Iterator[MoeModel]:
    """Yield the model with a plan applied; it is whole again when the block ends."""
    whole = [layer.tensors() for layer in model.layers]
    try:
        yield apply_plan(model, plan)
    finally:
        for layer, tensors in zip(model.layers, whole, strict=True):
            layer.replace(tensors)
        set_expert_counts(model)


def perplexity(score: Evaluation) -> Interval:
    """Return perplexity and its interval, also of tasks whose metric is accuracy."""
    losses, tokens = np.array(score.line_losses), np.array(score.line_tokens, np.float64)
    return (score.perplexity, *bootstrap_perplexity(losses, tokens))


def ratio(above: Evaluation, below: Evaluation) -> Interval:
    """Return the ratio of two perplexities over the same lines, and its paired interval."""
    losses = np.array(above.line_losses) - np.array(below.line_losses)
    tokens = np.array(above.line_tokens, np.float64)
    return (above.perplexity / below.perplexity, *bootstrap_perplexity(losses, tokens))


def render(
    model: MoeModel,
    statistics: Statistics,
    whole: dict[str, Evaluation],
    choices: Sequence[Choice],
    cells: Cells,
    tasks: Sequence[str],
) -> str:
    """Write the tables."""
    shape = model.shape
    calibrated = ", ".join(f"{name} {statistics.task(name).tokens}" for name in tasks)
    judged = ", ".join(
        f"{name} {whole[name].tokens} in {whole[name].n} lines" for name in tasks
    )
    lines = [
        "# Pruning",
        "",
        f"{shape.family}, {len(shape.layers)} MoE layers of "
        f"{'/'.join(map(str, sorted(set(shape.experts_per_layer))))} experts, top-k "
        f"{'/'.join(map(str, sorted({layer.top_k for layer in shape.layers})))}, checkpoint "
        f"{statistics.checkpoint_sha256[:12]}. Tokens calibrated: {calibrated}. Tokens scored: "
        f"{judged}.",
        "",
        "Perplexity on the test text of each task [95% interval]; own task in bold.",
        "",
        *header(["experts kept", "method", "chosen by", *tasks]),
        row(["all", "", "", *(show(perplexity(whole[name])) for name in tasks)]),
    ]
    for choice in choices:
        shown = [show(perplexity(cells[choice, name])) for name in tasks]
        marked = [
            f"**{cell}**" if name == choice.chooser else cell
            for name, cell in zip(tasks, shown, strict=True)
        ]
        lines.append(row([str(choice.keep), choice.method, choice.chooser, *marked]))
    lines += [
        "",
        *render_own(choices, cells, tasks),
        "",
        *render_methods(choices, cells, tasks),
    ]
    return "\n".join(lines)


def render_own(choices: Sequence[Choice], cells: Cells, tasks: Sequence[str]) -> list[str]:
    """Compare own choice with every other one, per method."""
    lines = [
        "Perplexity with experts chosen by others, divided by that with experts chosen by the "
        "own task and the same method [95% paired interval]; above 1 the own task is better.",
        "",
        *header(["experts kept", "method", "chosen by", *tasks]),
    ]
    wins = clear = total = 0
    pairs = dict.fromkeys((c.keep, c.method) for c in choices if c.method != DRAWN)
    for keep, method in pairs:
        others = [c for c in choices if c.keep == keep and c.method in {DRAWN, method}]
        for other in others:
            shown = []
            for name in tasks:
                if other.chooser == name:
                    shown.append("own")
                    continue
                value = ratio(cells[other, name], cells[Choice(keep, method, name), name])
                shown.append(show(value))
                total, wins, clear = total + 1, wins + (value[0] > 1), clear + (value[1] > 1)
            label = other.chooser if other.method != DRAWN else f"{DRAWN} {other.chooser}"
            lines.append(row([str(keep), method, label, *shown]))
    lines += ["", f"Own task better in {wins} of {total} cells, interval above 1 in {clear}."]
    return lines


def render_methods(choices: Sequence[Choice], cells: Cells, tasks: Sequence[str]) -> list[str]:
    """Set the methods side by side, each with experts chosen by the own task."""
    keeps = list(dict.fromkeys(choice.keep for choice in choices))
    methods = list(dict.fromkeys(choice.method for choice in choices))
    lines = [
        "Methods side by side: perplexity with experts chosen by the own task; random is the "
        "geometric mean of its seeds, with the lowest and the highest.",
        "",
        *header(["experts kept", "task", *methods]),
    ]
    for keep in keeps:
        for name in tasks:
            shown = []
            for method in methods:
                scores = [
                    cells[c, name]
                    for c in choices
                    if (c.keep, c.method) == (keep, method)
                    and (method == DRAWN or c.chooser == name)
                ]
                values = [score.perplexity for score in scores]
                drawn = (float(np.exp(np.mean(np.log(values)))), min(values), max(values))
                shown.append(show(drawn if method == DRAWN else perplexity(scores[0])))
            lines.append(row([str(keep), name, *shown]))
    return lines


def write_csv(path: Path, whole: dict[str, Evaluation], cells: Cells) -> None:
    """Write one row per cell; it replaces an earlier file."""
    with staged_file(path, force=True) as staged, staged.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(_COLUMNS)
        for name, score in whole.items():
            writer.writerow(
                ["all", "", "", name, "", *perplexity(score), score.tokens, score.n, 1, 1, 1]
            )
        for (choice, name), score in cells.items():
            own = int(choice.chooser == name)
            judged = [score.tokens, score.n, *ratio(score, whole[name])]
            chosen = [choice.keep, choice.method, choice.chooser, name, own]
            writer.writerow([*chosen, *perplexity(score), *judged])


def show(value: Interval) -> str:
    """Write a value and its interval."""
    return f"{value[0]:.3g} [{value[1]:.3g}, {value[2]:.3g}]"


def header(cells: Sequence[str]) -> list[str]:
    """Write the head of a Markdown table."""
    return [row(cells), row(["---"] * len(cells))]


def row(cells: Sequence[str]) -> str:
    """Write a row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def say(message: str) -> None:
    """Tell the person who waits."""
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
