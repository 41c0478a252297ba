"""``edgemoe allocate`` on the way from a plan to a bundle."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import pytest

from edgemoe.allocate import ppo
from edgemoe.plans.plan import Plan
from edgemoe_runtime import Session
from edgemoe_runtime.bundle.manifest_file import load_manifest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from click.testing import Result

    Answer: TypeAlias = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def plan(road: Path, answer: Answer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan that merges eight experts to five, for code."""
    folder = tmp_path_factory.mktemp("plan")
    task = f"--task=code={road}/code.jsonl"
    answer("calibrate", road / "moe", task, "-o", folder / "stats")
    asked = ("--stats", folder / "stats", "--task", "code", "--method", "ream")
    answer("prune", road / "moe", *asked, "--keep-experts", 5, "-o", folder / "plan.json")
    return folder / "plan.json"


@pytest.mark.slow
@pytest.mark.fused
@pytest.mark.parametrize(
    ("policy", "options"),
    [
        ("fixed", ["--set", "k=2,1"]),
        ("alloc-l", ["--mean-k", "1.5"]),
        ("top-p", ["--mean-k", "1.5"]),
        ("top-p", ["--set", "p=0.35", "--set", "k_max=4"]),
        ("fisher", ["--mean-k", "1.5"]),
        ("ada-k", ["--mean-k", "1.5", "--set", "steps=3", "--set", "batch_tokens=200"]),
    ],
)
def test_a_merged_model_follows_the_policy_to_the_device(
    road: Path, plan: Path, answer: Answer, tmp_path: Path, policy: str, options: list[str]
) -> None:
    task = f"--task=code={road}/code.jsonl"
    both = tmp_path / "both.json"
    asked = ("--policy", policy, *options, "--plan", plan, "-o", both)
    told = answer("allocate", road / "moe", task, *asked)
    assert told["mean_k_before"] == 2
    if "--mean-k" in options:
        assert told["mean_k"] == pytest.approx(1.5, abs=0.1)
    described = answer("inspect", both)
    assert described["method"] == "ream"
    assert described["k_policy"]["policy"] == policy
    assert described["k_policy"]["most_k"] == told["most_k_per_layer"]
    assert Plan.load(both).layers == Plan.load(plan).layers

    applied = answer("apply", road / "moe", "--plan", both, "-o", tmp_path / "small")
    assert applied["k_policy"] == policy
    small = answer("inspect", tmp_path / "small")
    assert small["k_policy"] == described["k_policy"]
    assert small["experts_per_layer"] == [5, 5]
    score = answer("evaluate", tmp_path / "small", f"--task=prose={road}/prose.jsonl")
    assert score["experts_per_token"] == pytest.approx(told["mean_k"], abs=0.4)
    bundle = tmp_path / "bundle"
    answer("export", tmp_path / "small", "-o", bundle, "--target", "cpu", "--precision", "fp32")
    with Session.open(bundle) as session:
        made = session.generate("def add(first, second):", max_new_tokens=8)
        assert 1 <= made.experts_per_token <= max(told["most_k_per_layer"])
    ran = answer("evaluate", bundle, f"--task=prose={road}/prose.jsonl")
    assert ran["value"] == pytest.approx(score["value"], rel=1e-4)
    # Rounding may turn a token that is at the edge of another number.
    assert ran["experts_per_token"] == pytest.approx(score["experts_per_token"], abs=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["top-p", "fisher", "ada-k"])
def test_factored_experts_follow_the_policy_to_every_target(
    road: Path, answer: Answer, tmp_path: Path, policy: str
) -> None:
    task = f"--task=code={road}/code.jsonl"
    stats, plan, both = (tmp_path / name for name in ("stats", "plan.json", "both.json"))
    answer("calibrate", road / "moe", task, "-o", stats)
    asked = ("--stats", stats, "--task", "code", "--method", "svd-whitened", "-o", plan)
    answer("decompose", road / "moe", *asked, "--param-ratio", 0.6)
    options = ["--set", "steps=2", "--set", "batch_tokens=200"] if policy == "ada-k" else []
    decided = ("--policy", policy, "--mean-k", 1.5, *options, "--plan", plan, "-o", both)
    told = answer("allocate", road / "moe", task, *decided)
    assert told["mean_k"] == pytest.approx(1.5, abs=0.1)
    answer("apply", road / "moe", "--plan", both, "-o", tmp_path / "small")
    score = answer("evaluate", tmp_path / "small", f"--task=prose={road}/prose.jsonl")
    # By itself, and as the weights of a task of the model that it was made from.
    small, named = [tmp_path / "small"], [road / "moe", "--from", f"code={tmp_path}/small"]
    for target, exported in (("cpu", small), ("tensorrt-rtx", small), ("cpu", named)):
        made = ("-o", tmp_path / "bundle", "--target", target, "--precision", "fp32", "--force")
        answer("export", *exported, *made)
        ran = answer("evaluate", tmp_path / "bundle", f"--task=prose={road}/prose.jsonl")
        assert ran["value"] == pytest.approx(score["value"], rel=1e-4)
        assert ran["experts_per_token"] == pytest.approx(score["experts_per_token"], abs=0.02)


def test_what_is_read_is_not_replaced(
    road: Path, plan: Path, invoke: Callable[..., Result], tmp_path: Path
) -> None:
    lines, old = tmp_path / "code.jsonl", tmp_path / "plan.json"
    lines.write_bytes((road / "code.jsonl").read_bytes())
    old.write_bytes(plan.read_bytes())
    for target in (lines, old):
        before = target.read_bytes()
        asked = ("--task", f"code={lines}", "--plan", old, "--policy", "fixed", "--force")
        result = invoke("allocate", road / "moe", *asked, "-o", target)
        assert result.exit_code == 1
        assert "output must not contain what is read" in result.stderr
        assert target.read_bytes() == before


def test_an_interrupted_training_goes_on_with_the_same_options_only(
    road: Path, invoke: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "k.json"
    asked = ["allocate", road / "moe", f"--task=code={road}/code.jsonl", "--policy", "ada-k"]
    asked += ["--set", "batch_tokens=50", "-o", output]

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ppo, "improve", stop)
        result = invoke(*asked, "--set", "steps=2")
    assert result.exit_code != 0
    assert output.with_name("k.json.partial").exists()
    for other in (["--set", "steps=3"], ["--set", "steps=2", "--seed", "1"]):
        result = invoke(*asked, *other)
        assert result.exit_code == 1
        assert "k.json.partial" in result.stderr
    result = invoke(*asked[:3], "--policy", "fixed", "-o", output)
    assert result.exit_code == 1
    assert "k.json.partial is of a training that was interrupted" in result.stderr
    result = invoke(*asked, "--set", "steps=2")
    assert result.exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["k.json"]


def test_a_policy_that_saves_nothing_says_so(
    road: Path, invoke: Callable[..., Result], tmp_path: Path
) -> None:
    asked = ("allocate", road / "moe", f"--task=code={road}/code.jsonl", "--policy", "fixed")
    for number, (k, noted) in enumerate((("2", True), ("1", False))):
        result = invoke(*asked, "--set", f"k={k}", "-o", tmp_path / f"{number}.json")
        assert result.exit_code == 0
        assert ("no token uses fewer experts" in result.stdout) is noted


@pytest.mark.fused
def test_a_ladder_has_the_tables_of_alloc_l(road: Path, answer: Answer, tmp_path: Path) -> None:
    task, held_out = f"--task=code={road}/code.jsonl", f"--task=code={road}/prose.jsonl"
    output = tmp_path / "k.json"
    asked = ("--policy", "alloc-l", "--mean-k", 2, "--set", "tokens=200", "-o", output)
    answer("allocate", road / "moe", task, *asked)
    needs = [rule.needs for rule in Plan.load(output).k_policy.rules]  # type: ignore[union-attr]
    assert [len(need) for need in needs if need] == [2, 2]
    told: tuple[object, ...] = (
        "--target",
        "cpu",
        "--precision",
        "fp32",
        "--max-drop",
        9,
        "--json",
    )
    told += ("--accept-large-drop", "--accept-weak-evidence", "--no-speed")
    answer("export", road / "moe", held_out, "--plan", f"code={output}", *told,
           "-o", tmp_path / "bundle")  # fmt: skip
    ladder = load_manifest(tmp_path / "bundle").tasks["code"].k_ladder
    assert ladder is not None
    assert ladder[0].k_cap == (2, 2)
    # Rungs that save no time on two small layers are left out; which, depends on the machine.
    better = 0 if needs[0][0] - needs[0][1] < needs[1][0] - needs[1][1] else 1  # type: ignore[index]
    tables = {"k1.50": (1, 2) if better == 0 else (2, 1), "k1.00": (1, 1)}
    for rung in ladder[1:]:
        assert rung.k_cap == tables[rung.name]


def test_lines_that_chose_k_judge_nothing_and_experts_stay(
    road: Path, answer: Answer, invoke: Callable[..., Result], tmp_path: Path
) -> None:
    task = f"--task=code={road}/code.jsonl"
    output = tmp_path / "k.json"
    answer("allocate", road / "moe", task, "--policy", "top-p", "-o", output)
    answer("apply", road / "moe", "--plan", output, "-o", tmp_path / "small")
    refused = invoke("evaluate", tmp_path / "small", task)
    assert refused.exit_code == 1
    assert "12 of 12 lines" in refused.stderr
    # Its tokens are shared out among these experts: others are for the whole model.
    measured = tmp_path / "stats"
    answer("calibrate", road / "moe", task, "--max-tokens", 50, "-o", measured)
    small, left = tmp_path / "small", sorted(tmp_path.iterdir())
    stats = ("--stats", measured, "--task", "code")
    plan = tmp_path / "cut.json"
    plan.write_text(Plan.load(output).to_json())
    for words in (
        ("prune", small, *stats, "--method", "reap", "--keep", 0.5),
        ("decompose", small, *stats, "--method", "svd", "--param-ratio", 0.5),
        ("sweep", small, task, "--method", "reap"),
        ("export", small, task, "--target", "cpu"),
        ("apply", small, "--plan", plan),
    ):
        refused = invoke(*words, "-o", tmp_path / "less")
        assert refused.exit_code == 1
        assert "before k is allocated" in refused.stderr
    plan.unlink()
    assert sorted(tmp_path.iterdir()) == left


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--policy", "nope"], "policy must be one of"),
        (["--policy", "fixed", "--set", "k=3,x"], "k must be integers"),
        (["--policy", "fixed", "--set", "p=1"], "an option of fixed must be"),
        (["--policy", "top-p", "--mean-k", "7"], r"--mean-k must be in [1, 2]"),
        (["--policy", "fixed", "--set", "k=6"], "between 1 and 5 experts"),
    ],
)
def test_refusals_leave_nothing(
    road: Path,
    plan: Path,
    invoke: Callable[..., Result],
    tmp_path: Path,
    options: list[str],
    message: str,
) -> None:
    task = f"--task=code={road}/code.jsonl"
    asked = ("--plan", plan, "-o", tmp_path / "k.json")
    result = invoke("allocate", road / "moe", task, *options, *asked)
    assert result.exit_code == 1
    assert message in result.stderr
    assert list(tmp_path.iterdir()) == []
