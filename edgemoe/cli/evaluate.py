"""`edgemoe evaluate`: quality of a checkpoint or a bundle on a task."""

from __future__ import annotations

from typing import Any

import click

from edgemoe.api.evaluate import evaluate as score
from edgemoe.cli.options import PATH, command, options_of, report, reporting
from edgemoe.tasks import split_task_arguments

option = options_of(score)


@command(
    "edgemoe evaluate demo/moe --task code=demo/tasks/code.test.jsonl",
    "edgemoe evaluate demo/bundle --task code=demo/tasks/code.test.jsonl --json",
)
@click.argument("model", type=PATH, metavar="MODEL|BUNDLE")
@option("--task", metavar="NAME=FILE", help="Held-out examples, JSON Lines.")
@option("--k-cap", type=click.IntRange(1), help="At most so many experts per token.")
@option(
    "--max-tokens",
    type=click.IntRange(1),
    help="Tokens to read, from the first example on; all without.",
)
@option("--window", type=click.IntRange(2), help="Tokens of a window of text.  [default: 512]")
@option(
    "--rolling",
    is_flag=True,
    help="Score texts as a whole too: --json adds lm-eval's byte and word perplexity.",
)
@option("--generate", is_flag=True, help="Judge completions by exact match.")
@option(
    "--calibration-lines",
    type=click.Choice(["refuse", "skip", "warn"]),
    help="What to do with examples that MODEL was pruned or trained on (contamination): their "
    "score says little of other examples.",
)
@reporting
def evaluate(as_json: bool, task: str, **given: Any) -> None:
    """Evaluate a model, dense or MoE, or a bundle on held-out examples of a task.

    Text and completions are scored by perplexity, choices by accuracy, and with --generate
    completions by exact match of greedy generation; each with a 95% confidence interval.
    """
    evaluation = score(task=split_task_arguments([task]), **given)
    low, high = evaluation.ci95
    metric = evaluation.metric.replace("_", " ")
    used = evaluation.experts_per_token
    text = (
        f"{evaluation.task}: {metric} {evaluation.value:.4g} (95% interval "
        f"{low:.4g} to {high:.4g}; {evaluation.n} lines, {evaluation.tokens} tokens)"
    )
    if used is not None:
        text += f", {used:.4g} experts per token and layer"
    report(
        {**evaluation.to_dict(details=True), "experts_per_token": used}, text, as_json=as_json
    )
