"""Quality against experts per token, for every policy, on tasks of the reference model.

Each policy decides on a task's calibration lines how many experts tokens use, for several
means, and is judged on lines that nothing has read: perplexity against what the tokens really
used, and its rise over the router's own top-k with a 95% interval over paired lines. Run it
from the repository's root, with the demo's model and a folder that
benchmarks/reference_moe/corpus.py wrote::

    python benchmarks/adaptive_k/policies.py demo/moe --tasks demo/domains --work policies

Markdown goes to stdout, progress to stderr; --work keeps what is finished. The training of
ada-k takes most of the time.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import torch

from edgemoe.allocate.registry import allocate, read_options
from edgemoe.calibrate.windows import cut_tasks
from edgemoe.evaluate.evaluation import Evaluation, evaluate
from edgemoe.evaluate.torch_scorer import TorchScorer
from edgemoe.models import load_model, load_tokenizer
from edgemoe.models.k_policy import following
from edgemoe.oracle.homes import MemoryHome
from edgemoe.oracle.oracle import LayerOracle
from edgemoe.staging import staged_file
from edgemoe.tasks import TaskFile

sys.path.append(str(Path(__file__).parents[1] / "compression"))
from commands import show_drop, show_score, write_table

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from edgemoe.k_policy import KPolicy
    from edgemoe.models.contract import MoeModel


class Trial:
    """One model on one task, and what was found for it."""

    def __init__(
        self, model: MoeModel, tokenizer: Tokenizer, task: str, tasks: Path, work: Path
    ) -> None:
        self._model, self._tokenizer, self._task, self._work = model, tokenizer, task, work
        self._lines = TaskFile.load(task, tasks / f"{task}.train.jsonl")
        self._held_out = TaskFile.load(task, tasks / f"{task}.test.jsonl")
        self._oracle: LayerOracle | None = None

    def judge(
        self, name: str, mean_k: float | None, options: str, tokens: int, held_out: int
    ) -> dict[str, Any]:
        """Decide and judge, or tell what was found.

        Args:
            name: The policy; empty for the router's own top_k.
            mean_k: Experts per token and layer to aim at.
            options: NAME=VALUE with commas between them.
            tokens: Tokens to decide on.
            held_out: Tokens to judge by.

        Returns:
            The score, what tokens used, and the seconds of deciding.
        """
        key = "-".join(filter(None, (self._task, name or "top-k", f"{mean_k}", options)))
        file = self._work / f"{key}.json"
        if not file.exists():
            click.echo(key, err=True)
            began = time.process_time()
            policy = self._decide(name, mean_k, options, tokens) if name else None
            seconds = time.process_time() - began
            with following(self._model, policy):
                scorer = TorchScorer(self._model)
                found = evaluate(scorer, self._held_out, self._tokenizer, max_tokens=held_out)
                used = scorer.experts_per_token
            content = {
                "score": asdict(found),
                "used": used,
                "seconds": seconds,
                "most": [] if policy is None else [rule.slots for rule in policy.rules],
            }
            with staged_file(file, force=True) as staged:
                staged.write_text(json.dumps(content) + "\n", encoding="utf-8")
        found_here: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        score = found_here["score"]
        found_here["score"] = Evaluation.from_json(score)
        return found_here

    def _decide(self, name: str, mean_k: float | None, options: str, tokens: int) -> KPolicy:
        if self._oracle is None:
            cut = cut_tasks(self._model, [self._lines], self._tokenizer, max_tokens=tokens)
            windows = cut.by_task[self._task]
            self._oracle = LayerOracle(MemoryHome(self._model), windows)
        given = read_options(name, options.split(",") if options else [])
        return allocate(self._oracle, name, task=self._task, mean_k=mean_k, options=given)


@click.command()
@click.argument("model", type=click.Path(path_type=Path, exists=True))
@click.option("--tasks", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--task", "names", multiple=True, default=("bible", "code", "logs"))
@click.option("--work", type=click.Path(path_type=Path), required=True)
@click.option("--mean-k", "means", type=float, multiple=True, default=(5.0, 4.0, 3.0))
@click.option(
    "--policy",
    "policies",
    multiple=True,
    default=("fixed", "alloc-l", "top-p", "top-p:k_max=12", "ada-k:steps=0", "ada-k"),
    help="NAME or NAME:OPTION=VALUE,...; repeatable.",
)
@click.option("--tokens", default=16384, show_default=True)
@click.option("--held-out-tokens", default=4096, show_default=True)
@click.option("--threads", default=1, show_default=True)
def main(
    model: Path,
    tasks: Path,
    names: tuple[str, ...],
    work: Path,
    means: tuple[float, ...],
    policies: tuple[str, ...],
    tokens: int,
    held_out_tokens: int,
    threads: int,
) -> None:
    """Compare policies on MODEL."""
    torch.set_num_threads(threads)
    work.mkdir(parents=True, exist_ok=True)
    opened, tokenizer = load_model(model), load_tokenizer(model)
    for task in names:
        trial = Trial(opened, tokenizer, task, tasks, work)
        before = trial.judge("", None, "", tokens, held_out_tokens)
        rows = [["top-k", f"{before['used']:.2f}", show_score(before["score"]), "", ""]]
        for asked in policies:
            name, _, options = asked.partition(":")
            for mean in means:
                found = trial.judge(name, mean, options, tokens, held_out_tokens)
                rows.append(
                    [
                        f"`{asked}`",
                        f"{found['used']:.2f}",
                        show_score(found["score"]),
                        show_drop(before["score"], found["score"]),
                        f"{found['seconds']:.0f}",
                    ]
                )
        click.echo(f"\n**{task}**\n")
        heading = ["policy", "experts per token", "perplexity [95%]", "rise [95%]"]
        write_table([*heading, "processor seconds"], rows)


if __name__ == "__main__":
    main()
