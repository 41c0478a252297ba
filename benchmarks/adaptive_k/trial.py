"""Policies of one model on one task: each is decided and judged once, and kept."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from edgemoe.allocate.registry import allocate, read_options
from edgemoe.calibrate.windows import cut_tasks
from edgemoe.evaluate.evaluation import Evaluation, evaluate
from edgemoe.evaluate.torch_scorer import TorchScorer
from edgemoe.k_policy import KPolicy
from edgemoe.models.k_policy import following
from edgemoe.oracle.homes import MemoryHome
from edgemoe.oracle.oracle import LayerOracle
from edgemoe.staging import staged_file
from edgemoe.tasks import TaskFile

if TYPE_CHECKING:
    from pathlib import Path

    from tokenizers import Tokenizer

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
            The score, what tokens used, the seconds of deciding, and the policy, or None.
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
                "policy": None if policy is None else policy.to_json(),
            }
            with staged_file(file, force=True) as staged:
                staged.write_text(json.dumps(content) + "\n", encoding="utf-8")
        found_here: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        found_here["score"] = Evaluation.from_json(found_here["score"])
        if found_here["policy"] is not None:
            found_here["policy"] = KPolicy.from_json(found_here["policy"], str(file))
        return found_here

    def _decide(self, name: str, mean_k: float | None, options: str, tokens: int) -> KPolicy:
        if self._oracle is None:
            cut = cut_tasks(self._model, [self._lines], self._tokenizer, max_tokens=tokens)
            windows = cut.by_task[self._task]
            self._oracle = LayerOracle(MemoryHome(self._model), windows)
        given = read_options(name, options.split(",") if options else [])
        return allocate(self._oracle, name, task=self._task, mean_k=mean_k, options=given)
