"""Mistakes are told by their names, once, and before torch is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from edgemoe.api import method_names
from edgemoe.models.tiny import write_tiny_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from click.testing import Result

# Runs the command line and says what was imported when it ended.
SCRIPT = """
import sys
from edgemoe.cli import main
try:
    main(sys.argv[1:], standalone_mode=True)
except SystemExit as end:
    code = end.code
heavy = [name for name in ("torch", "transformers", "onnxruntime") if name in sys.modules]
print("imported:", heavy, "status:", code)
"""


@pytest.fixture(scope="module")
def nouns(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint, task files, statistics and a plan."""
    import edgemoe

    folder = tmp_path_factory.mktemp("nouns")
    write_tiny_checkpoint("qwen3_moe", folder / "moe")
    lines = [json.dumps({"text": f"w{n} w{n + 1} w{n + 2} w{n + 3}"}) for n in range(20)]
    (folder / "good.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "broken.jsonl").write_text("\n".join([*lines[:3], '{"text": ']) + "\n")
    measured = edgemoe.calibrate(
        folder / "moe", {"t": folder / "good.jsonl"}, folder / "t.stats"
    )
    edgemoe.prune(folder / "moe", measured, "t", "reap", folder / "t.json", keep=0.5)
    return folder


def run_light(folder: Path, *arguments: object) -> tuple[str, str]:
    """Run a command in a new process; its message, and the line on imports."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, arguments)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )
    return " ".join(done.stderr.split()), done.stdout.strip().splitlines()[-1]


GOOD, BROKEN = "--task=t=good.jsonl", "--task=t=broken.jsonl"
EXPORT = ("export", "moe", "--target", "cpu", "-o", "out")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("calibrate", "moe", BROKEN, "-o", "out"), "broken.jsonl, line 4"),
        (("evaluate", "moe", BROKEN), "broken.jsonl, line 4"),
        ((*EXPORT, BROKEN), "broken.jsonl, line 4"),
        (("recover", "moe", BROKEN, "--method=lora", "-o", "out"), "broken.jsonl, line 4"),
        (("sweep", "moe", BROKEN, "--method=reap", "-o", "out"), "broken.jsonl, line 4"),
        (("allocate", "moe", BROKEN, "-o", "out"), "broken.jsonl, line 4"),
        (("calibrate", "moe", GOOD, "-o", "no/out"), "mkdir -p no"),
        ((*EXPORT, GOOD, "--method=magic"), "method must be one of camera"),
        (("calibrate", "moe", GOOD, "-o", "out", "--device=gpu"), "cpu, cuda, cuda:N or auto"),
        (("carve", "moe", "--data=good.jsonl", "-o", "out", "--seed=-1"), "in [0, inf)"),
        (
            ("sweep", "moe", GOOD, "--method=reap", "--set=reap:x=1", "-o", "out"),
            "an option of reap must be NAME=VALUE, got 'x=1'",
        ),
        (
            ("prune", "moe", "--stats=t.stats", "--task=t", "--method=naee", "--keep=.5",
             "--set=tokens=many", "-o", "out"),
            "option tokens of naee must be an integer",
        ),
        (
            ("allocate", "moe", GOOD, "--seed=-1", "-o", "out"),
            "must be in [0, 4294967296), got -1",
        ),
        (("apply", "moe", "--plan=t.stats", "-o", "out"), "got statistics (t.stats)"),
        (
            ("prune", "moe", "--stats=t.json", "--task=t", "--method=reap", "--keep=.5",
             "-o", "out"),
            "got a plan (t.json): --plan",
        ),
    ],
)  # fmt: skip
def test_mistakes_import_no_torch(
    nouns: Path, arguments: tuple[str, ...], message: str
) -> None:
    told, imported = run_light(nouns, *arguments)

    assert message in told
    assert imported == "imported: [] status: 1"
    assert not (nouns / "out").exists()
    assert not (nouns / "no").exists()


def test_inspecting_a_checkpoint_imports_no_torch(nouns: Path) -> None:
    _, imported = run_light(nouns, "inspect", "moe")

    assert imported == "imported: [] status: 0"


def test_each_file_is_called_what_it_is(nouns: Path, invoke: Callable[..., Result]) -> None:
    def refuse(*arguments: object) -> str:
        result = invoke(*arguments)
        assert result.exit_code == 1, result.output
        return result.stderr

    moe, plan, stats, task = (nouns / n for n in ("moe", "t.json", "t.stats", "good.jsonl"))
    out = ("-o", nouns / "out")
    pruned = ("--task=t", "--method=reap", "--keep=0.5", *out)
    assert "got a checkpoint" in refuse("prune", moe, "--stats", moe, *pruned)
    assert "got a task file" in refuse("prune", moe, "--stats", task, *pruned)
    assert "got a plan" in refuse("calibrate", moe, f"--task=t={plan}", *out)
    assert "got statistics" in refuse("calibrate", moe, f"--task=t={stats}", *out)
    assert "got a checkpoint" in refuse("run", moe, "--prompt", "x")
    assert "got statistics" in refuse("bench", stats)
    assert "got a plan" in refuse("verify", plan)
    assert "got a plan" in refuse("calibrate", plan, f"--task=t={task}", *out)
    assert "got a task file" in refuse("inspect", task)
    assert "got a safetensors file of weights" in refuse("inspect", moe / "model.safetensors")


def test_an_option_that_counts_once_is_given_once(
    nouns: Path, invoke: Callable[..., Result]
) -> None:
    moe, task = nouns / "moe", f"--task=t={nouns / 'good.jsonl'}"
    for arguments in (
        ("evaluate", moe, task, task),
        ("allocate", moe, task, task, "-o", nouns / "out"),
        ("calibrate", moe, task, "-o", nouns / "out", "-o", nouns / "other"),
        ("run", moe, "--prompt", "a", "--prompt", "b"),
        ("export", moe, "--target=cpu", "--target=cuda", "-o", nouns / "out"),
        ("export", moe, "--target=cpu", "--ladder", "--no-ladder", "-o", nouns / "out"),
    ):
        result = invoke(*arguments)
        assert result.exit_code == 2, arguments
        assert "must be given once, got it 2 times" in " ".join(result.stderr.split())
    twice = invoke("calibrate", moe, task, task, "-o", nouns / "out")
    assert "must differ, got 't' twice" in twice.stderr
    methods = ("--stats", nouns / "t.stats", "--task=t", "--method=random", "--keep=0.5")
    again = ("--set", "ratios=given", "--set", "ratios=given")
    set_twice = invoke(
        "prune", moe, *methods[:3], "--method=moe-i2", "--keep=0.5", *again, "-o", nouns / "out"
    )
    assert "ratios of moe-i2 must be given once" in set_twice.stderr


def test_a_plan_of_another_checkpoint_is_told_as_that(
    nouns: Path, invoke: Callable[..., Result], tmp_path: Path
) -> None:
    """Its layers do not fit either, but that is no help to whoever mixed two models up."""
    write_tiny_checkpoint("mixtral", tmp_path / "other", num_hidden_layers=2)
    plan = ("--plan", nouns / "t.json")
    for arguments in (
        ("apply", tmp_path / "other", *plan, "-o", tmp_path / "out"),
        ("export", tmp_path / "other", "--target=cpu", f"--plan=t={nouns / 't.json'}",
         "-o", tmp_path / "out"),
    ):  # fmt: skip
        result = invoke(*arguments)
        assert result.exit_code == 1
        assert "must have been made for this checkpoint" in result.stderr


@pytest.mark.parametrize("option", ["--task=t=PIPE", "--stats=PIPE", "--plan=PIPE", "MODEL"])
def test_pipes_are_refused_and_not_waited_for(
    nouns: Path, invoke: Callable[..., Result], tmp_path: Path, option: str
) -> None:
    pipe, moe, out = tmp_path / "pipe", nouns / "moe", ("-o", tmp_path / "out")
    os.mkfifo(pipe)
    given = option.replace("PIPE", str(pipe))
    arguments: dict[str, tuple[Any, ...]] = {
        "--task=t=PIPE": ("calibrate", moe, given, *out),
        "--stats=PIPE": ("prune", moe, given, "--task=t", "--method=reap", "--keep=.5", *out),
        "--plan=PIPE": ("apply", moe, given, *out),
        "MODEL": ("inspect", pipe),
    }
    result = invoke(*arguments[option])

    assert result.exit_code == 1
    assert "a pipe, a socket or a device" in result.stderr


def test_messages_are_short_and_have_no_control_characters(
    nouns: Path, invoke: Callable[..., Result], tmp_path: Path
) -> None:
    long = "x" * 5000
    nasty = tmp_path / "\x1b[31mred\u202e.jsonl"
    nasty.write_text(json.dumps({long: 1, "text": long}) + "\n")
    out = ("-o", tmp_path / "out")
    for arguments in (
        ("calibrate", nouns / "moe", f"--task=t={nasty}", *out),
        ("calibrate", nouns / "moe", f"--task={long}", *out),
        ("calibrate", nouns / "moe", f"--task={long}={nasty}", *out),
        ("prune", nouns / "moe", "--stats", nouns / "t.stats", f"--task={long}",
         "--method=reap", "--keep=0.5", *out),
        ("export", nouns / "moe", f"--target={long}", *out),
        (long,),
    ):  # fmt: skip
        result = invoke(*arguments)
        assert result.exit_code in (1, 2)
        assert len(result.stderr.encode()) < 1400  # with the usage lines of click
        assert "x" * 201 not in result.stderr
        assert "\x1b" not in result.stderr
        assert "\u202e" not in result.stderr


def test_names_of_methods_are_those_of_the_registries() -> None:
    from edgemoe.allocate.registry import POLICIES
    from edgemoe.decompose.decision import method_options
    from edgemoe.decompose.registry import METHODS as DECOMPOSITION
    from edgemoe.prune.owl import LAYER_OPTIONS
    from edgemoe.prune.registry import METHODS as PRUNING
    from edgemoe.recover.registry import METHODS as RECOVERY

    assert set(method_names.RECOVERY) == set(RECOVERY)
    for names, registry in (
        (method_names.PRUNING, PRUNING),
        (method_names.DECOMPOSITION, DECOMPOSITION),
        (method_names.POLICIES, POLICIES),
    ):
        assert set(names) == set(registry)
        options = {
            name: method_options(name) if registry is DECOMPOSITION else method.options
            for name, method in registry.items()
        }
        told = method_names.OPTIONS[names]
        assert {name: given for name, given in options.items() if given} == told
    assert method_names.LAYER_OPTIONS == LAYER_OPTIONS


def test_inspect_fits_on_a_screen(nouns: Path, invoke: Callable[..., Result]) -> None:
    for noun in ("moe", "t.stats", "t.json"):
        shown = invoke("inspect", nouns / noun)
        assert shown.exit_code == 0, shown.output
        lines = shown.stdout.splitlines()
        assert 5 <= len(lines) <= 24
        assert max(map(len, lines)) <= 100
    plan = json.loads((nouns / "t.json").read_text())
    assert plan["calibration_lines"] not in invoke("inspect", nouns / "t.json").stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", ["mixtral", "gpt_oss", "granitemoe", "jamba", "ernie4_5_moe", "hunyuan_v1_moe"]
)
def test_headers_tell_what_the_model_tells(family: str, tmp_path: Path) -> None:
    """One family for each way to store experts."""
    from edgemoe.cli.describe.checkpoint import describe_checkpoint

    write_tiny_checkpoint(family, tmp_path / "moe")
    headers = describe_checkpoint(tmp_path / "moe")

    told = describe_checkpoint(tmp_path / "moe", full=True)
    assert headers == {name: told[name] for name in headers}
    assert headers["experts_per_layer"]
