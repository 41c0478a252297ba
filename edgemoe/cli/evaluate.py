"""``edgemoe evaluate``: quality of a checkpoint or a bundle on a task."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from edgemoe.cli.extras import needs
from edgemoe.cli.options import PATH, report, reporting

if TYPE_CHECKING:
    from pathlib import Path


@click.command()
@click.argument("model", type=PATH, metavar="MODEL|BUNDLE")
@click.option("--task", required=True, metavar="NAME=FILE", help="Held-out data.")
@click.option("--k-cap", type=click.IntRange(1), help="At most so many experts per token.")
@click.option("--max-tokens", type=click.IntRange(1), help="Read the first lines only.")
@click.option(
    "--window", type=click.IntRange(2), help="Tokens of a window of text.  [default: 512]"
)
@click.option(
    "--rolling",
    is_flag=True,
    help="Score texts as a whole too: --json adds lm-eval's byte and word perplexity.",
)
@click.option("--generate", is_flag=True, help="Judge completions by exact match.")
@click.option(
    "--calibration-lines",
    type=click.Choice(["refuse", "skip", "warn"]),
    default="refuse",
    show_default=True,
    help="What to do with lines that MODEL was pruned or trained on: their score says little "
    "of other lines.",
)
@reporting
def evaluate(
    model: Path,
    task: str,
    k_cap: int | None,
    max_tokens: int | None,
    window: int | None,
    rolling: bool,
    generate: bool,
    calibration_lines: str,
    as_json: bool,
) -> None:
    """Judge a model, dense or MoE, or a bundle on a task.

    Text and completions are judged by perplexity, choices by accuracy, and with --generate
    completions by whether greedy generation gives them back; with a 95% interval.
    """
    from edgemoe.evaluate.contamination import keep_held_out, lines_behind
    from edgemoe.evaluate.evaluation import evaluate as judge
    from edgemoe.evaluate.rolling import find_prefix_token
    from edgemoe.evaluate.subject import open_subject
    from edgemoe.tasks import TaskFile
    from edgemoe_runtime.bundle.names import MANIFEST_FILE

    task_file = TaskFile.parse(task)
    if not (model / MANIFEST_FILE).is_file():
        needs("export")
    lines = lines_behind(model, task_file.name)
    task_file, remark = keep_held_out(task_file, lines, calibration_lines, str(model))
    if remark is not None:
        click.echo(f"Warning: {remark}", err=True)
    with open_subject(model, task=task_file.name, k_cap=k_cap) as subject:
        evaluation = judge(
            subject.scorer,
            task_file,
            subject.tokenizer,
            max_tokens=max_tokens,
            generate=subject.generate if generate else None,
            window=window,
            prefix_token=find_prefix_token(model, subject.tokenizer) if rolling else None,
        )
    low, high = evaluation.ci95
    metric = evaluation.metric.replace("_", " ")
    used = subject.experts_per_token()
    text = (
        f"{evaluation.task}: {metric} {evaluation.value:.4g} (95% interval "
        f"{low:.4g} to {high:.4g}; {evaluation.n} lines, {evaluation.tokens} tokens)"
    )
    if used is not None:
        text += f", {used:.4g} experts per token and layer"
    report(
        {**evaluation.to_dict(details=True), "experts_per_token": used}, text, as_json=as_json
    )
