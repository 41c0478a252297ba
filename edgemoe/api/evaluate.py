"""Evaluate a checkpoint or a bundle on a task."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from edgemoe.api.arguments import read_task
from edgemoe.api.checks import check_checkpoint
from edgemoe.api.extras import needs
from edgemoe.api.running import running
from edgemoe.file_kinds import identify

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgemoe.api.arguments import OneTask, StrPath
    from edgemoe.evaluate.evaluation import Evaluation
    from edgemoe.progress import OnProgress

_LOG = logging.getLogger(__name__)


def evaluate(
    model: StrPath,
    task: OneTask,
    *,
    k_cap: int | Sequence[int] | None = None,
    max_tokens: int | None = None,
    window: int | None = None,
    rolling: bool = False,
    generate: bool = False,
    calibration_lines: Literal["refuse", "skip", "warn"] = "refuse",
    on_progress: OnProgress | None = None,
) -> Evaluation:
    """Evaluate a checkpoint, dense or Mixture-of-Experts, or a bundle on a task.

    Text and completions are scored by perplexity, choices by accuracy, and with `generate`
    completions by exact match of greedy generation; each with its 95% interval. A checkpoint
    that is larger than memory is read layer by layer; a bundle needs no torch. Nothing is
    written.

    Sources: lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness), whose
    figures docs/guides/evaluation.md compares; the interval of accuracies is Wilson's, that of
    perplexities a bootstrap (https://arxiv.org/abs/1411.5279).

    Args:
        model: Checkpoint directory or bundle.
        task: Held-out examples: their file by the task's name, or a task that is loaded. Of a
            bundle with several tasks the graph of that name is evaluated.
        k_cap: Most experts per token, in [1, top_k]: one number for all MoE layers, or one for
            each; None leaves it to the model.
        max_tokens: Tokens to read, from the first example on, in [2, inf); None reads all.
        window: Tokens of a window of text, in [2, longest sequence of the model]; None takes
            512, or what the model takes.
        rolling: Also score texts as a whole: the details then have lm-eval's word and byte
            perplexity.
        generate: Judge completions by exact match, besides their perplexity.
        calibration_lines: What to do with examples that the model was pruned or trained on,
            whose score says little of others: `refuse` them, `skip` them, or keep them and
            `warn` by the logger `edgemoe.api`.
        on_progress: Called with each `edgemoe.progress.ProgressEvent`; None draws a bar
            where stderr is a terminal.

    Returns:
        The metric with its interval, the perplexity (exp of nats per token), and the losses in
        nats and tokens of each example, for paired comparisons.

    Raises:
        TaskFileError: The task file breaks the format, no token can be scored, a count is out
            of range, `generate` is given for a task without completions, or examples were
            calibrated on and are refused.
        CheckpointError: The checkpoint is missing, unsafe or inconsistent, answers NaN, or is
            dense and `k_cap` is given.
        FamilyError: It has experts and its family is not supported.
        edgemoe_runtime.errors.BundleError: The bundle cannot be used, or has no such task.
        MissingDependencyError: A checkpoint is evaluated without the extra `export`.

    Example:
        >>> from edgemoe import evaluate
        >>> evaluation = evaluate("moe", {"code": "code.test.jsonl"})
        >>> low, high = evaluation.ci95
    """
    path = Path(model)
    # A bundle can be evaluated where it runs, without torch.
    extras = () if identify(path).name == "bundle" else ("export",)
    needs(*extras)
    if extras:
        check_checkpoint(path)
    loaded = read_task(task, path)
    with running(*extras, on_progress=on_progress):
        from edgemoe.evaluate.contamination import examples_seen, keep_held_out
        from edgemoe.evaluate.evaluation import evaluate as score
        from edgemoe.evaluate.rolling import find_prefix_token
        from edgemoe.evaluate.subject import open_subject

        behind = examples_seen(path, loaded.name)
        loaded, remark = keep_held_out(loaded, behind, calibration_lines, str(model))
        if remark is not None:
            _LOG.warning("%s", remark)
        with open_subject(path, task=loaded.name, k_cap=k_cap) as subject:
            prefix = find_prefix_token(path, subject.tokenizer) if rolling else None
            evaluation = score(
                subject.scorer,
                loaded,
                subject.tokenizer,
                max_tokens=max_tokens,
                generate=subject.generate if generate else None,
                window=window,
                prefix_token=prefix,
            )
            return replace(evaluation, experts_per_token=subject.experts_per_token())
