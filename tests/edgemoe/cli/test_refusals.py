"""Bad input: exit status 1, one message, and nothing half-written."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from click.testing import Result

EXPORT = ("--target", "cpu", "--precision", "fp32")


@pytest.fixture
def refuse(invoke: Callable[..., Result], tmp_path: Path) -> Callable[..., str]:
    """Run a command that must be refused; its message."""

    def run(*arguments: object) -> str:
        before = sorted(tmp_path.rglob("*"))
        result = invoke(*arguments)
        assert result.exit_code == 1, result.output
        assert result.stdout == ""
        assert last_line(result.stderr).startswith("Error: ")
        assert "Traceback" not in result.stderr
        assert "unexpected" not in result.stderr
        assert sorted(tmp_path.rglob("*")) == before
        return result.stderr

    return run


def last_line(stderr: str) -> str:
    """What an export says behind its stages."""
    return stderr.strip().splitlines()[-1]


def task_file(folder: Path, *lines: str) -> str:
    path = folder / "task.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines))
    return f"--task=mine={path}"


def edit_config(checkpoint: Path, **entries: object) -> None:
    path = checkpoint / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


@pytest.mark.fused
@pytest.mark.parametrize(
    "lines",
    [
        ('{"text": "one"}', '{"text": "two"'),
        ('{"text": "one"}', '{"prompt": "two", "completion": "three"}'),
        ('{"text": "one"}', '{"words": "two"}'),
    ],
)
def test_a_bad_line_is_named(
    road: Path, refuse: Callable[..., str], tmp_path: Path, lines: tuple[str, ...]
) -> None:
    task = task_file(tmp_path, *lines)

    assert "line 2" in refuse("calibrate", road / "moe", task, "-o", tmp_path / "stats")
    assert "line 2" in refuse("evaluate", road / "moe", task)
    assert "line 2" in refuse("export", road / "moe", task, *EXPORT, "-o", tmp_path / "b")


@pytest.mark.fused
def test_missing_files_are_named(
    road: Path, refuse: Callable[..., str], tmp_path: Path
) -> None:
    gone = tmp_path / "gone"

    for command in ("inspect", "verify", "bench"):
        assert str(gone) in refuse(command, gone)
    assert str(gone) in refuse("run", gone, "--prompt", "x")
    assert str(gone) in refuse("carve", gone, "-o", tmp_path / "out")
    assert str(gone) in refuse("export", gone, *EXPORT, "-o", tmp_path / "out")
    assert str(gone) in refuse("apply", road / "moe", "--plan", gone, "-o", tmp_path / "out")
    assert str(gone) in refuse("evaluate", road / "moe", f"--task=mine={gone}")
    assert str(gone) in refuse("merge-stats", gone, gone, "-o", tmp_path / "out")


@pytest.mark.fused
def test_a_pickle_is_refused(road: Path, refuse: Callable[..., str], tmp_path: Path) -> None:
    pickled = shutil.copytree(road / "moe", tmp_path / "pickled")
    (pickled / "model.safetensors").unlink()
    torch.save({"weight": torch.zeros(2)}, pickled / "pytorch_model.bin")

    for command in (
        ("export", pickled, *EXPORT, "-o", tmp_path / "b"),
        ("evaluate", pickled, f"--task=code={road}/code.jsonl"),
        ("inspect", pickled),
    ):
        assert "pytorch_model.bin" in refuse(*command)


@pytest.mark.fused
def test_an_unknown_family_is_told_where_the_known_ones_are_listed(
    road: Path, refuse: Callable[..., str], tmp_path: Path
) -> None:
    strange = shutil.copytree(road / "moe", tmp_path / "strange")
    edit_config(strange, model_type="llama")

    message = refuse("export", strange, *EXPORT, "-o", tmp_path / "bundle")

    assert "got 'llama': it has no experts" in message
    assert "docs/families.md" in message
    assert "glm4_moe" not in message


@pytest.mark.fused
def test_too_few_experts_for_k_are_refused_before_anything_runs(
    road: Path, refuse: Callable[..., str], invoke: Callable[..., Result], tmp_path: Path
) -> None:
    one_each = [{"layer": layer, "experts": [{"members": [3]}]} for layer in range(2)]
    plan = tmp_path / "plan.json"
    head = {"format": "edgemoe.plan", "version": 1, "method": "by-hand", "options": {}}
    rest = {"seed": 0, "task": None, "checkpoint_sha256": None, "statistics_sha256": None}
    document = {**head, **rest, "edgemoe_version": None, "layers": one_each}
    plan.write_text(json.dumps(document))

    assert "top_k=2" in refuse("apply", road / "moe", "--plan", plan, "-o", tmp_path / "out")
    assert "top_k=2" in refuse(
        "export", road / "moe", *EXPORT, "--plan", f"code={plan}", "-o", tmp_path / "out"
    )
    stats = road / "refused-stats"
    invoke("calibrate", road / "moe", f"--task=code={road}/code.jsonl", "-o", stats, "--force")
    asked = ("--stats", stats, "--task", "code", "--method", "reap", "--keep", 0.1)
    assert "top_k=2" in refuse("prune", road / "moe", *asked, "-o", tmp_path / "plan2.json")


def test_an_existing_output_stays_unless_forced(
    road: Path, bundle: Path, refuse: Callable[..., str]
) -> None:
    before = (bundle / "manifest.json").read_bytes()

    assert "--force" in refuse("export", road / "moe", *EXPORT, "-o", bundle)
    assert (bundle / "manifest.json").read_bytes() == before


def test_a_tampered_bundle_is_refused(copied_bundle: Path, refuse: Callable[..., str]) -> None:
    weights = copied_bundle / "shared.onnx.data"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)

    assert "altered" in refuse("verify", copied_bundle)
    assert "altered" in refuse("run", copied_bundle, "--task=code", "--prompt=x")


def test_external_data_outside_the_bundle_is_refused(
    copied_bundle: Path, refuse: Callable[..., str], tmp_path: Path
) -> None:
    import onnx

    shutil.copy(copied_bundle / "shared.onnx.data", tmp_path / "outside.data")
    graph = onnx.load(copied_bundle / "code.onnx", load_external_data=False)
    for tensor in graph.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location" and entry.value == "shared.onnx.data":
                entry.value = "../outside.data"
    rewritten = graph.SerializeToString()
    (copied_bundle / "code.onnx").write_bytes(rewritten)
    relist(copied_bundle, "code.onnx", rewritten)

    assert "../outside.data" in refuse("verify", copied_bundle)
    assert "../outside.data" in refuse("run", copied_bundle, "--task=code", "--prompt=x")


def relist(bundle: Path, name: str, content: bytes) -> None:
    """Make the manifest agree with a changed file, as somebody malicious would."""
    import hashlib

    path = bundle / "manifest.json"
    document = json.loads(path.read_text())
    entry = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    document["size"]["total_bytes"] += len(content) - document["files"][name]["size"]
    document["files"][name] = entry
    path.write_text(json.dumps(document))


def test_a_wrong_call_exits_with_two(invoke: Callable[..., Result], road: Path) -> None:
    assert invoke("export", road / "moe").exit_code == 2
    assert invoke("nonsense").exit_code == 2
    assert invoke("run", road / "moe", "--no-such-option").exit_code == 2
    both = (
        "--keep",
        0.5,
        "--keep-experts",
        4,
        "--stats",
        "s",
        "--task",
        "t",
        "--method",
        "reap",
    )
    assert invoke("prune", road / "moe", *both, "-o", "p").exit_code == 2


def test_debug_shows_the_traceback(invoke: Callable[..., Result], tmp_path: Path) -> None:
    result = invoke("verify", tmp_path / "gone", "--debug")

    assert result.exit_code == 1
    assert type(result.exception).__name__ == "ManifestError"


def edgemoe(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "edgemoe.cli", *map(str, arguments)]


def limit_file_size() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


@pytest.mark.fused
def test_force_spares_what_is_read(
    road: Path, invoke: Callable[..., Result], tmp_path: Path
) -> None:
    copy = shutil.copytree(road / "moe", tmp_path / "demo" / "moe")
    task = f"--task=code={road}/code.jsonl"
    before = sorted(path for path in tmp_path.rglob("*"))
    for arguments in (
        ("calibrate", copy, task, "-o", copy),
        ("apply", copy, "--plan", tmp_path / "plan.json", "-o", tmp_path / "demo"),
        ("carve", copy, "-o", tmp_path / "demo"),
        ("export", copy, task, "--target=cpu", "-o", tmp_path / "demo"),
    ):
        result = invoke(*arguments, "--force")
        assert result.exit_code == 1, arguments
        assert "output must" in result.stderr
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_statistics_are_known_by_their_content(
    road: Path, invoke: Callable[..., Result], tmp_path: Path
) -> None:
    invoke("calibrate", road / "moe", f"--task=code={road}/code.jsonl", "-o", tmp_path / "s")
    assert "statistics" in invoke("inspect", tmp_path / "s").stdout
    (tmp_path / "text").write_text("nothing of ours")
    assert invoke("inspect", tmp_path / "text").exit_code == 1


@pytest.mark.slow
@pytest.mark.fused
@pytest.mark.parametrize("command", ["export", "apply"])
def test_a_full_disk_leaves_nothing(
    road: Path, invoke: Callable[..., Result], tmp_path: Path, command: str
) -> None:
    """A file size limit stands for the full disk: the kernel refuses the write."""
    plan = tmp_path / "plan.json"
    if command == "export":
        asked = edgemoe("export", road / "moe", *EXPORT, "-o", tmp_path / "out")
    else:
        stats = tmp_path / "stats"
        invoke("calibrate", road / "moe", f"--task=code={road}/code.jsonl", "-o", stats)
        options = ("--task=code", "--method=reap", "--keep=0.5", "-o", plan)
        invoke("prune", road / "moe", "--stats", stats, *options)
        asked = edgemoe("apply", road / "moe", "--plan", plan, "-o", tmp_path / "out")
    before = sorted(tmp_path.rglob("*"))

    done = subprocess.run(
        asked, preexec_fn=limit_file_size, capture_output=True, text=True, check=False
    )

    assert done.returncode == 1
    *before_it, message = done.stderr.strip().splitlines()
    assert message.startswith("Error: ")
    assert all(line.startswith("stage ") for line in before_it)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.fused
@pytest.mark.parametrize("interruption", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_export_leaves_nothing(
    road: Path, tmp_path: Path, interruption: signal.Signals
) -> None:
    with subprocess.Popen(
        edgemoe("export", road / "moe", *EXPORT, "-o", tmp_path / "out"),
        stderr=subprocess.PIPE,
        text=True,
        # What a shell starts in the background ignores Ctrl-C, and so do its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        # Staged output shows that the work has begun.
        deadline = time.monotonic() + 300
        while not list(tmp_path.iterdir()) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(interruption)
        _, stderr = process.communicate(timeout=300)

    assert process.returncode == 1
    assert last_line(stderr) == "Error: interrupted. Nothing was left half-written."
    assert list(tmp_path.iterdir()) == []


def test_a_closed_pipe_is_no_failure(bundle: Path) -> None:
    with subprocess.Popen(
        edgemoe("inspect", bundle, "--json"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        process.stdout.close()
        stderr = process.stderr.read() if process.stderr else b""

    assert process.returncode == 0
    assert stderr == b""


def test_a_missing_extra_is_one_line_of_advice(road: Path, tmp_path: Path) -> None:
    blocked = "import sys; sys.modules['torch'] = None; from edgemoe.cli import main; main()"
    command = ["export", str(road / "moe"), *EXPORT, "-o", str(tmp_path / "out")]

    done = subprocess.run(
        [sys.executable, "-c", blocked, *command], capture_output=True, text=True, check=False
    )

    assert done.returncode == 1
    assert done.stderr.strip().endswith("pip install 'edgemoe[export]'")


def test_a_cluster_without_ray_is_one_line_of_advice(
    road: Path, refuse: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    task = f"--task=code={road / 'code.jsonl'}"
    command = ("calibrate", road / "moe", task, "-o", tmp_path / "out")

    assert "Run: pip install 'edgemoe[ray]'" in refuse(*command, "--ray", "auto")


@pytest.mark.parametrize("workers", [(), ("--workers", 2)])
def test_a_gpu_that_is_not_there_is_refused(
    road: Path, refuse: Callable[..., str], tmp_path: Path, workers: tuple[object, ...]
) -> None:
    task = f"--task=code={road / 'code.jsonl'}"
    command = ("calibrate", road / "moe", task, "-o", tmp_path / "out", *workers)

    assert "must be one that torch sees" in refuse(*command, "--device", "cuda:9")


def test_the_runtimes_commands_need_no_torch(bundle: Path, road: Path) -> None:
    blocked = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'transformers', 'onnx', "
        "'onnx_ir', 'safetensors', 'scipy', 'rich'])); from edgemoe.cli import main; main()"
    )
    for command in (
        ["--help"],
        ["run", str(bundle), "--task=code", "--prompt=def ", "--max-new-tokens=3"],
        ["verify", str(bundle)],
        ["inspect", str(bundle)],
        ["doctor"],
        [
            "evaluate",
            str(bundle),
            f"--task=code={road}/code.jsonl",
            "--max-tokens=100",
            "--calibration-lines=warn",
        ],
    ):
        done = subprocess.run(
            [sys.executable, "-c", blocked, *command],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONWARNINGS": "error"},
        )
        assert done.returncode == 0, done.stderr
