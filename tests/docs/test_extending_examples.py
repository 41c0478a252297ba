"""The worked examples of docs/extending run, and do what their pages say."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from edgemoe.models.tiny import write_tiny_checkpoint
from edgemoe.prune.registry import METHODS
from edgemoe_runtime import BackendError, Session
from edgemoe_runtime.backends.registry import BACKENDS

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs" / "extending" / "examples"


@pytest.fixture(autouse=True)
def untouched_registries() -> Iterator[None]:
    """Take out again what an example registers."""
    methods, backends = dict(METHODS), dict(BACKENDS)
    yield
    for registry, before in ((METHODS, methods), (BACKENDS, backends)):
        for name in set(registry) - set(before):
            del registry[name]


def load(name: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


def test_a_new_method_decides_by_its_own_score() -> None:
    plan, statistics = load("mean_gate")["main"]()

    assert plan.method == "mean-gate"
    for layer in plan.layers:
        sums = statistics.tasks["words"].layers[layer.layer]
        means = {
            expert: sums.gate_mass[expert] / sums.count[expert] if sums.count[expert] else 0.0
            for expert in range(8)
        }
        best = sorted(means, key=lambda expert: (-means[expert], expert))[:4]
        assert [expert.members[0] for expert in layer.experts] == sorted(best)


@pytest.mark.slow
def test_a_family_that_works_holds_in_every_step() -> None:
    results = load("try_family")["try_family"]("olmoe", "--no-graphs")

    assert results == dict.fromkeys(("identity", "uniform", "ragged", "factored"), "yes")


def test_a_family_without_experts_is_refused_by_name() -> None:
    with pytest.raises(SystemExit) as refused:
        load("try_family")["try_family"]("llama")

    assert refused.value.code == 1


def test_every_step_of_the_check_is_explained() -> None:
    from edgemoe.cli import main

    known = load("try_family")["PROVES"]
    options = {name for option in main.commands["families"].params for name in option.opts}
    assert {"--check", "--no-graphs", "--no-engine"} <= options
    assert list(known)[:4] == ["identity", "uniform", "ragged", "factored"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny bundle of primitive ops."""
    from click.testing import CliRunner

    from edgemoe.cli import main

    folder = tmp_path_factory.mktemp("reference")
    write_tiny_checkpoint("mixtral", folder / "moe")
    options = ["--target", "jetson-orin", "--precision", "fp32", "-o", str(folder / "bundle")]
    done = CliRunner().invoke(main, ["export", str(folder / "moe"), *options])
    assert done.exit_code == 0, done.output
    return folder / "bundle"


@pytest.mark.slow
def test_a_new_backend_makes_the_tokens_of_onnxruntime(bundle: Path) -> None:
    example = load("reference_backend")
    prompt, choices = "w1 w2 w3", ["w4 w5", "w6"]

    answers = []
    for backend in (example["NAME"], "onnxruntime"):
        with Session.open(bundle, backend=backend, max_length=32) as session:
            generation = session.generate(prompt, max_new_tokens=6)
            # Choices are compared from a mark that is gone back to.
            answers.append((generation.tokens, str(session.classify("w1", choices))))
            assert backend in generation.backend
    assert answers[0] == answers[1]


@pytest.mark.slow
def test_a_backend_says_why_it_cannot_open_a_graph(bundle: Path, tmp_path: Path) -> None:
    import json
    import shutil

    example = load("reference_backend")
    other = tmp_path / "bundle"
    shutil.copytree(bundle, other)
    manifest = json.loads((other / "manifest.json").read_text("utf-8"))
    manifest["flavour"] = "ort"
    (other / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")

    with pytest.raises(BackendError, match="primitive ops only, got flavour ort"):
        Session.open(other, backend=example["NAME"])
