"""Run lm-eval on local task files, in an interpreter that has it.

    python run_lm_eval.py JOBS ANSWERS

JOBS is a JSON list of objects: ``checkpoint`` and ``tasks``, two directories, and
``arguments`` of lm-eval's HFLM. Every YAML file in ``tasks`` is a task. ANSWERS becomes a list
of objects from a task's name to its metrics and to ``samples``: for each line and each request
the log-likelihood, with whether it is greedy where lm-eval says so.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer


def run(checkpoint: str, tasks: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Evaluate one checkpoint on the tasks of a folder."""
    model = HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32),
        tokenizer=AutoTokenizer.from_pretrained(checkpoint),
        device="cpu",
        **arguments,
    )
    names = sorted(path.stem for path in Path(tasks).glob("*.yaml"))
    found = lm_eval.simple_evaluate(
        model=model,
        tasks=names,
        task_manager=TaskManager(include_path=tasks, include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )
    answers = {}
    for name in names:
        samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
        metrics = found["results"][name]
        answers[name] = {
            **{key.split(",")[0]: value for key, value in metrics.items()},
            "samples": [[answer for (answer,) in sample["resps"]] for sample in samples],
        }
    return answers


if __name__ == "__main__":
    torch.set_num_threads(1)
    jobs = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps([run(**job) for job in jobs], default=str))
