"""The same lines, judged by `edgemoe evaluate` and by lm-eval, give the same numbers."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from edgemoe.cli import main
from edgemoe.evaluate.requests import build_examples
from edgemoe.evaluate.rolling import find_prefix_token
from edgemoe.evaluate.subject import open_subject
from edgemoe.tasks import TaskFile

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
DRIVER = Path(__file__).with_name("run_lm_eval.py")
# What lm-eval imports to judge local files, and what is not here already; the rest of what it
# asks for serves other tasks, and would double the download.
PACKAGES = (
    "lm-eval", "colorama", "datasets", "dill", "lxml", "multiprocess", "pandas", "portalocker",
    "pyarrow", "python-dateutil", "pytz", "sacrebleu", "six", "tabulate", "tzdata", "xxhash",
)  # fmt: skip
UNREACHABLE = ("from versions: none", "connection broken", "HTTPSConnectionPool")

TRAINING = (
    "The spindle vibrates above its limit, so the bearing is checked first.\n",
    "def add(first, second):\n    return first + second\n",
    "Answer: bearing\nAnswer: limit\n",
)
LONG = "The spindle vibrates above its limit, so the bearing is checked first. " * 4
CHOICES: list[dict[str, Any]] = [
    {
        "prompt": "The spindle vibrates. Answer:",
        "choices": [" bearing", " the limit", " first"],
    },
    # White space at the prompt's end, which joins what follows, or is a token of its own.
    {"prompt": "Check it first.\nAnswer: ", "choices": ["bearing", "limit", "no"]},
    {"prompt": "Check it first.\nAnswer:\n", "choices": ["bearing", "no limit"]},
    {"prompt": "def add(first, second):\n    ", "choices": ["return first", "pass", "..."]},
    {"prompt": "return first +  \t", "choices": ["second", "first", "add"]},
    # Characters of two to four bytes; the first of these is likelier per byte only.
    {"prompt": "Welle:", "choices": [" €", " ;;!"]},
    {"prompt": "Welle:", "choices": [" prüfen", " läuft über", " 🔧", " stop"]},
    # One token each, and one that begins as another does.
    {"prompt": "limit", "choices": [",", ".", "\n", ".\n"]},
    # Too long for the model, by more for one choice than for the other.
    {"prompt": LONG, "choices": [" bearing", " the spindle is checked, so add the limit"]},
]
COMPLETIONS = [
    {"prompt": "The spindle vibrates", "completion": " above its limit"},
    {"prompt": "Check it first.\nAnswer: ", "completion": "bearing"},
    {"prompt": "Check it first.\nAnswer:\n", "completion": "bearing"},
    {"prompt": LONG, "completion": " second, läuft"},
]
TEXTS = [
    {"text": TRAINING[0]},
    {"text": "x"},
    {"text": "  prüfen 🔧\n\n"},
    {"text": LONG},
    {"text": "\t".join(TRAINING)},
]
YAML = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
target_delimiter: ""
"""
OF_KIND = {
    "choice": """
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}, {metric: acc_bytes}]
""",
    "completion": """
output_type: loglikelihood
doc_to_text: "{{prompt}}"
doc_to_target: "{{completion}}"
metric_list: [{metric: perplexity}, {metric: acc}]
""",
    "text": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
""",
}


@pytest.fixture(scope="module")
def environment(
    pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """Variables of a process that can import lm-eval; it is installed once, beside the rest.

    It is 400 MB with pandas and pyarrow, so no extra brings it: it goes into pytest's cache.
    """
    variables = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path_factory.mktemp("huggingface")),
        "TOKENIZERS_PARALLELISM": "false",
    }
    if find_spec("lm_eval") is not None:
        return variables
    if find_spec("pip") is None:
        pytest.skip("lm-eval is not installed, and neither is pip to install it")
    cache = getattr(pytestconfig, "cache", None)
    folder = (cache.mkdir if cache else tmp_path_factory.mktemp)("lm-eval")
    # Each at its tested version; given as constraints, pip would hide what failed.
    pins = [
        line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line.partition("==")[0] in PACKAGES
    ]
    made_with = "\n".join([sys.version, *pins])
    done = folder / "made-with.txt"
    if not done.exists() or done.read_text() != made_with:
        shutil.rmtree(folder)
        pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--only-binary", ":all:"]
        pip += ["--quiet", "--no-compile", "--retries", "1", "--timeout", "30"]
        pip += ["--target", str(folder)]
        installed = subprocess.run([*pip, *pins], capture_output=True, text=True)
        if installed.returncode and any(sign in installed.stderr for sign in UNREACHABLE):
            pytest.skip("lm-eval is not installed, and the package index cannot be reached")
        assert installed.returncode == 0, installed.stderr
        done.write_text(made_with)
    return {**variables, "PYTHONPATH": str(folder)}


@dataclass(frozen=True)
class Job:
    """One checkpoint with its task files, and what lm-eval and edgemoe are told besides."""

    checkpoint: Path
    tasks: Path
    arguments: dict[str, Any]
    options: tuple[str, ...] = ()

    def file(self, kind: str) -> Path:
        return self.tasks / f"{kind}.jsonl"

    def evaluate(self, kind: str, *options: str) -> dict[str, Any]:
        """What the command answers."""
        task = f"--task={kind}={self.file(kind)}"
        arguments = ["evaluate", str(self.checkpoint), task, "--json", *self.options, *options]
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, result.output
        found: dict[str, Any] = json.loads(result.stdout)
        return found

    def log_likelihoods(self, kind: str) -> list[list[float]]:
        """Of each line and each of its continuations; of a text as a whole."""
        window = int(self.options[1]) if self.options else None
        with open_subject(self.checkpoint) as (scorer, tokenizer, *_):
            questions = build_examples(
                TaskFile.load(kind, self.file(kind)),
                tokenizer,
                max_length=scorer.max_length if window is None else window,
                max_tokens=None,
                prefix_token=find_prefix_token(self.checkpoint, tokenizer),
            )
            found = []
            for question in questions:
                text = question.rolling
                scores = scorer.score(text.requests if text else question.requests)
                sums = [float(part.sum()) for parts in scores for part in parts]
                found.append([sum(sums)] if text else sums)
        return found


def write_checkpoint(folder: Path, *, adds_bos: bool) -> None:
    """A random model of 64 positions with a byte-level tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TRAINING, trainer)
    names = {"eos_token": "</s>"}
    if adds_bos:
        names["bos_token"] = "<s>"
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    wrapped: Any = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    wrapped.save_pretrained(folder)
    config: Any = transformers.Qwen2MoeConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    transformers.Qwen2MoeForCausalLM(config).save_pretrained(folder)


def write_task(folder: Path, kind: str, rows: list[dict[str, Any]]) -> None:
    file = folder / f"{kind}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / f"{kind}.yaml").write_text(YAML.format(name=kind, file=file) + OF_KIND[kind])


def find_greedy_rows(checkpoint: Path) -> list[dict[str, str]]:
    """Prompts with the token that the model gives next, where no other tokens spell the two."""
    rows = []
    with open_subject(checkpoint) as (_, tokenizer, generate, _):
        for length in range(1, len(LONG) // 2):
            prompt = LONG[:length]
            text = generate(prompt, 1)
            made = tokenizer.encode(text, add_special_tokens=False).ids
            whole = tokenizer.encode(prompt + text).ids
            alone = len(made) == 1 and whole == [*tokenizer.encode(prompt).ids, *made]
            if alone and text.strip() and prompt == prompt.rstrip():
                rows.append({"prompt": prompt, "completion": text})
            if len(rows) == 3:
                return rows
    raise AssertionError("the model must give text back that its tokenizer cuts as it did")


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    """What is judged: a checkpoint as it is, in shorter windows, and one that adds a BOS."""
    folder = tmp_path_factory.mktemp("jobs")
    for name in ("plain", "bos"):
        (folder / name).mkdir()
        write_checkpoint(folder / name, adds_bos=name == "bos")
        tasks = folder / f"{name}-tasks"
        tasks.mkdir()
        # A prompt that has the token which the tokenizer would add.
        written_out = [{**CHOICES[0], "prompt": "<s>" + CHOICES[0]["prompt"]}]
        rows = [*CHOICES, *(written_out if name == "bos" else [])]
        write_task(
            tasks, "choice", [{**row, "answer": index % 2} for index, row in enumerate(rows)]
        )
        write_task(tasks, "completion", [*COMPLETIONS, *find_greedy_rows(folder / name)])
    for name in ("plain", "short"):
        (folder / f"{name}-tasks").mkdir(exist_ok=True)
        write_task(folder / f"{name}-tasks", "text", TEXTS)
    (folder / "bos-texts").mkdir()
    write_task(folder / "bos-texts", "text", TEXTS)
    plain, bos = folder / "plain", folder / "bos"
    return {
        "plain": Job(plain, folder / "plain-tasks", {"batch_size": 3}),
        "short": Job(plain, folder / "short-tasks", {"max_length": 20}, ("--window", "20")),
        "bos": Job(bos, folder / "bos-tasks", {"batch_size": 2}),
        # lm-eval scores the BOS that a tokenizer adds as if it were text, unless told not to.
        "bos-texts": Job(bos, folder / "bos-texts", {"add_bos_token": False}),
    }


@pytest.fixture(scope="module")
def field(
    jobs: dict[str, Job], environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What lm-eval says, by job and task."""
    folder = tmp_path_factory.mktemp("lm-eval")
    asked = [
        {"checkpoint": str(job.checkpoint), "tasks": str(job.tasks), "arguments": job.arguments}
        for job in jobs.values()
    ]
    (folder / "jobs.json").write_text(json.dumps(asked))
    ran = subprocess.run(
        [sys.executable, DRIVER, folder / "jobs.json", folder / "answers.json"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    return dict(zip(jobs, json.loads((folder / "answers.json").read_text()), strict=True))


CASES = [
    ("plain", "choice"),
    ("plain", "completion"),
    ("plain", "text"),
    ("short", "text"),
    ("bos", "choice"),
    ("bos", "completion"),
    ("bos-texts", "text"),
]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_every_line_has_lm_evals_log_likelihood(
    jobs: dict[str, Job], field: dict[str, Any], name: str, kind: str
) -> None:
    ours = jobs[name].log_likelihoods(kind)
    samples = field[name][kind]["samples"]
    theirs = [[one[0] if isinstance(one, list) else one for one in line] for line in samples]
    assert [len(line) for line in ours] == [len(line) for line in theirs]
    for our_line, their_line in zip(ours, theirs, strict=True):
        assert our_line == pytest.approx(their_line, rel=1e-5, abs=1e-4)


@pytest.mark.parametrize("name", ["plain", "bos"])
def test_accuracies_are_lm_evals(
    jobs: dict[str, Job], field: dict[str, Any], name: str
) -> None:
    theirs = field[name]["choice"]
    assert theirs["acc_norm"] != theirs["acc_bytes"], "the lines must tell them apart"
    ours = jobs[name].evaluate("choice")
    assert ours["value"] == theirs["acc"]
    assert ours["details"]["accuracy_per_character"] == theirs["acc_norm"]
    assert ours["details"]["accuracy_per_byte"] == theirs["acc_bytes"]


@pytest.mark.parametrize("name", ["plain", "bos"])
def test_what_completions_are_told_is_lm_evals(
    jobs: dict[str, Job], field: dict[str, Any], name: str
) -> None:
    theirs = field[name]["completion"]
    ours = jobs[name].evaluate("completion", "--generate")
    assert 0 < ours["value"] < 1, "one kind of line would show nothing"
    assert ours["value"] == pytest.approx(theirs["acc"])
    assert ours["details"]["perplexity_per_line"] == pytest.approx(
        theirs["perplexity"], rel=1e-4
    )
    total = sum(sum(line[0] for line in lines[:1]) for lines in theirs["samples"])
    assert ours["perplexity"] == pytest.approx(math.exp(-total / ours["tokens"]), rel=1e-4)


@pytest.mark.parametrize("name", ["plain", "short", "bos-texts"])
def test_what_texts_are_told_is_lm_evals(
    jobs: dict[str, Job], field: dict[str, Any], name: str
) -> None:
    theirs = field[name]["text"]
    ours = jobs[name].evaluate("text", "--rolling")
    for key in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        assert ours["details"][key] == pytest.approx(theirs[key], rel=1e-4)
    assert ours["details"]["log_likelihood"] == pytest.approx(
        sum(total for (total,) in theirs["samples"]), rel=1e-6
    )
