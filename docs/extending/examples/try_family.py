"""Try a model family: build it tiny and random, prune, save, open again, export.

    python docs/extending/examples/try_family.py olmoe

The same as `edgemoe families --check olmoe --no-engine`; what each step proves is written out.
"""

from __future__ import annotations

import json
import subprocess
import sys

# Steps of `edgemoe families --check`, in order; the last ones are graphs.
PROVES = {
    "identity": "the layers were found: keeping all experts gives the same logits, bit by bit",
    "uniform": "experts can be taken out, and plain transformers opens what is left",
    "ragged": "layers may keep different numbers of experts",
    "factored": "experts may be stored as low-rank products",
    "ort": "router, activation, attention and norms are known to the exporter (onnxruntime)",
    "streamed": "it can be read one decoder layer at a time, with the same bytes",
    "tensorrt": "the same graph in primitive ops, for TensorRT",
    "engine": "TensorRT for RTX builds an engine of it",
}


def try_family(name: str, *options: str) -> dict[str, str]:
    """Run the check, and return what held.

    Args:
        name: The family, as `model_type` in config.json.
        options: More options of `edgemoe families`, such as `--no-graphs`.

    Returns:
        For each step that was tried `yes`, a number, or `no: reason`.
    """
    command = [sys.executable, "-m", "edgemoe.cli", "families", "--check", "--json", name]
    done = subprocess.run([*command, *options], stdout=subprocess.PIPE, text=True, check=False)
    if not done.stdout:
        sys.exit(done.returncode)  # refused by name: the message stands on stderr
    (found,) = json.loads(done.stdout)["families"]
    results: dict[str, str] = found["results"]
    return results


if __name__ == "__main__":
    for step, result in try_family(sys.argv[1], "--no-engine", *sys.argv[2:]).items():
        print(f"{step:<9} {result:<8} {PROVES[step]}")
