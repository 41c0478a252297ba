from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from edgemoe.cli import main
from edgemoe.tasks import TaskFile
from examples.demo.tasks import make_tasks

ROOT = Path(__file__).parent.parent
SPLITS = [(task, split) for task in ("code", "manual", "bible") for split in ("train", "test")]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    make_tasks(folder)
    return folder


@pytest.mark.parametrize(("task", "split"), SPLITS)
def test_the_demo_makes_a_valid_task_file(tasks: Path, task: str, split: str) -> None:
    found = TaskFile.load(task, tasks / f"{task}.{split}.jsonl")

    assert found.kind == "text"
    assert len(found.records) >= 8
    assert found.path.stat().st_size < 400_000


@pytest.mark.parametrize("task", ["code", "manual", "bible"])
def test_nothing_that_is_tested_was_trained_on(tasks: Path, task: str) -> None:
    def paragraphs(split: str) -> set[str]:
        lines = (tasks / f"{task}.{split}.jsonl").read_text("utf-8").splitlines()
        text = "\n\n".join(json.loads(line)["text"] for line in lines)
        return {part.strip() for part in re.split(r"\n\n|\n(?=\S)", text) if len(part) > 200}

    assert paragraphs("test")
    assert paragraphs("train") & paragraphs("test") == set()


def test_the_demo_says_what_it_does() -> None:
    help_text = subprocess.run(
        [sys.executable, "-m", "examples.demo.run", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout

    assert "--prepare" in help_text


def test_the_readme_names_commands_and_options_that_exist() -> None:
    text = (ROOT / "README.md").read_text("utf-8").replace("\\\n", " ")
    calls = [line for line in text.splitlines() if re.match(r"    (\$ )?edgemoe \w", line)]

    assert len(calls) >= 10
    for call in calls:
        name, *words = call.replace("$ ", "").split()[1:]
        known = {
            option for parameter in main.commands[name].params for option in parameter.opts
        }
        used = {word.split("=")[0] for word in words if re.match(r"--?[a-z]", word)}
        assert used <= known | {"--help"}, call


def test_the_readme_links_to_files_that_exist() -> None:
    for document in ("README.md", "CONTRIBUTING.md"):
        for target in re.findall(r"\]\((?!http)([^)#]+)", (ROOT / document).read_text("utf-8")):
            assert (ROOT / target).exists(), target
