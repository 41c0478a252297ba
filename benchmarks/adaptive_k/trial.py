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
from edgemoe.layerwise.provider import InMemoryLayers
from edgemoe.models.k_policy import following
from edgemoe.oracle.oracle import LayerOracle
from edgemoe.staging import staged_file
from edgemoe.tasks import TaskFile

if TYPE_CHECKING:
    from pathlib import Path

    from tokenizers import Tokenizer

    from edgemoe.calibrate.sample import Window
    from edgemoe.models.contract import MoeModel


def ask_about(
    model: MoeModel, tokenizer: Tokenizer, lines: TaskFile, tokens: int
) -> LayerOracle:
    """Return the oracle of a model in memory on the first tokens of a task's lines."""
    cut = cut_tasks(model, [lines], tokenizer, max_tokens=tokens)
    return LayerOracle(InMemoryLayers(model), cut.by_task[lines.name])


class Trial:
    """One model on one task, and what was found for it."""

    def __init__(
        self, model: MoeModel, tokenizer: Tokenizer, task: str, tasks: Path, work: Path
    ) -> None:
        self._model, self._tokenizer, self._task, self._work = model, tokenizer, task, work
        self._lines = TaskFile.load(task, tasks / f"{task}.train.jsonl")
        self._held_out = TaskFile.load(task, tasks / f"{task}.test.jsonl")
        self._oracle: LayerOracle | None = None

    def held_out(self, tokens: int) -> list[Window]:
        """Cut the first tokens of the lines that judge into windows."""
        cut = cut_tasks(self._model, [self._held_out], self._tokenizer, max_tokens=tokens)
        return cut.by_task[self._task]

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
            self._judge(file, policy, time.process_time() - began, held_out)
        return self._read(file)

    def follow(self, name: str, policy: KPolicy, held_out: int) -> dict[str, Any]:
        """Judge a policy that other lines decided, or tell what was found.

        Args:
            name: What to remember it by.
            policy: The policy.
            held_out: Tokens to judge by.

        Returns:
            As `judge`; the seconds are 0.
        """
        file = self._work / f"{self._task}-{name}.json"
        if not file.exists():
            click.echo(file.stem, err=True)
            self._judge(file, policy, 0.0, held_out)
        return self._read(file)

    def _judge(self, file: Path, policy: KPolicy | None, seconds: float, held_out: int) -> None:
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

    @staticmethod
    def _read(file: Path) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        found["score"] = Evaluation.from_json(found["score"])
        if found["policy"] is not None:
            found["policy"] = KPolicy.from_json(found["policy"], str(file))
        return found

    def _decide(self, name: str, mean_k: float | None, options: str, tokens: int) -> KPolicy:
        if self._oracle is None:
            self._oracle = ask_about(self._model, self._tokenizer, self._lines, tokens)
        given = read_options(name, options.split(",") if options else [])
        return allocate(self._oracle, name, task=self._task, mean_k=mean_k, options=given)
