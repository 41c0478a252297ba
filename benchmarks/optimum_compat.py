"""Does optimum open a bundle? Greedy tokens of three readers of the same single-task bundle.

    python -m benchmarks.optimum_compat BUNDLE --model CHECKPOINT [--task NAME] [--venv DIR]

optimum-onnx 0.1.0 pins transformers < 4.58, so it gets an environment of its own (about 1 GB,
made once in --venv). There `ORTModelForCausalLM` generates from the bundle; here the runtime's
Session does so from the bundle, and transformers, eagerly, from the checkpoint. The bundle must
have the experts of the checkpoint, as an export without --task has. optimum and the Session run
one graph, so their tokens must be equal; those of transformers must be equal where the bundle
is fp32. Exit status 1 says that they are not.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

PROMPT = "The spindle of station 4 vibrates above its limit, so"
NEW_TOKENS = 8
# torch first and alone: that is the build for CPUs where both are to be had.
REQUIREMENTS = (
    ("torch==2.13.0",),
    ("torch==2.13.0", "optimum-onnx==0.1.0", "transformers<4.58", "onnxruntime==1.31.1"),
)


def main() -> int:
    """Compare, and print one line for each reader."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--model", type=Path, help="the checkpoint that was exported")
    parser.add_argument("--task", help="the graph to read; needed where there are several")
    parser.add_argument("--venv", type=Path, default=Path(".venv-optimum"))
    parser.add_argument("--inside", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside is not None:
        print(json.dumps(generate_with_optimum(arguments.bundle, **arguments.inside)))
        return 0
    if arguments.model is None:
        parser.error("--model is required.")
    return compare(arguments.bundle, arguments.model, arguments.task, arguments.venv)


def compare(bundle: Path, checkpoint: Path, task: str | None, environment: Path) -> int:
    """Generate with all three and compare the tokens."""
    from edgemoe.models.checkpoint import load_tokenizer
    from edgemoe_runtime.bundle.manifest_file import load_manifest

    manifest = load_manifest(bundle)
    name, entry = manifest.task(task)
    ids = load_tokenizer(checkpoint).encode(PROMPT).ids
    python = make_environment(environment)
    inside = json.dumps({"graph": entry.graph, "ids": ids})
    answer = subprocess.run(
        [str(python), __file__, str(bundle), "--inside", inside],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    tokens = {
        "optimum": json.loads(answer.stdout.splitlines()[-1]),
        "session": generate_with_session(bundle, name),
        "transformers": generate_with_transformers(checkpoint, ids),
    }
    ends = set(manifest.model.eos_token_ids)
    for reader, generated in tokens.items():
        # Whether the end of the text is part of it differs between readers.
        while generated and generated[-1] in ends:
            generated.pop()
        print(f"{reader:14}{generated}")
    same = tokens["optimum"] == tokens["session"]
    if manifest.precision == "fp32":
        same = same and tokens["optimum"] == tokens["transformers"]
    print("equal" if same else "different")
    return 0 if same else 1


def make_environment(directory: Path) -> Path:
    """Return the Python of an environment that has optimum; make it where it is absent."""
    python = directory / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    done = directory / ".complete"
    if not done.exists():
        venv.create(directory, with_pip=True, clear=True)
        for packages in REQUIREMENTS:
            subprocess.run(
                [str(python), "-m", "pip", "install", "--quiet", *packages], check=True
            )
        done.touch()
    return python


def generate_with_optimum(bundle: Path, graph: str, ids: list[int]) -> list[int]:
    """Generate in the environment that has optimum."""
    from optimum.onnxruntime import ORTModelForCausalLM

    model = ORTModelForCausalLM.from_pretrained(bundle, file_name=graph, use_io_binding=False)
    return _generate_greedily(model, ids)


def generate_with_session(bundle: Path, task: str) -> list[int]:
    """Generate with the runtime."""
    from edgemoe_runtime import Session

    with Session.open(bundle, task=task) as session:
        generation = session.generate(PROMPT, max_new_tokens=NEW_TOKENS)
    return list(generation.tokens)


def generate_with_transformers(checkpoint: Path, ids: list[int]) -> list[int]:
    """Generate with the eager model."""
    from edgemoe.models.checkpoint import load_model

    return _generate_greedily(load_model(checkpoint).model, ids)


def _generate_greedily(model: Any, ids: list[int]) -> list[int]:
    """Return the tokens that a model of transformers' interface adds to `ids`."""
    import torch

    row = torch.tensor([ids])
    generated = model.generate(
        input_ids=row,
        attention_mask=torch.ones_like(row),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
    )
    tokens: list[int] = generated[0, len(ids) :].tolist()
    return tokens


if __name__ == "__main__":
    sys.exit(main())
