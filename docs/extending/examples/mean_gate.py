"""A pruning method in one file: keep the experts that are trusted most when they are chosen.

For expert j, with X_j the tokens that are routed to it and g_j(x) its gate::

    S_j = 1/|X_j| * sum_{x in X_j} g_j(x)

An expert that no token reached scores 0. Run it on a tiny random model::

    python docs/extending/examples/mean_gate.py
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgemoe.calibrate.statistics import Statistics
from edgemoe.models.tiny import write_tiny_checkpoint
from edgemoe.prune.registry import METHODS, make_plan, scoring

if TYPE_CHECKING:
    from typing import Any

    from numpy.typing import NDArray

    from edgemoe.plans.plan import Plan

NAME = "mean-gate"


def mean_gate(sums: Any) -> NDArray[np.float64]:
    """Return the mean gate of each expert of a layer.

    Args:
        sums: Sums of the layer over a task's tokens, `edgemoe.calibrate.sums.LayerSums`.

    Returns:
        Scores, float64 `[experts]`.
    """
    # An expert that was never chosen has a sum of 0 as well.
    scores: NDArray[np.float64] = sums.gate_mass / np.maximum(sums.count, 1)
    return scores


def main() -> tuple[Plan, Statistics]:
    """Calibrate a tiny model, decide with the new method, and show what it keeps.

    Returns:
        The plan, and the statistics that it was made from.
    """
    METHODS[NAME] = scoring(mean_gate)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tiny_checkpoint("mixtral", folder / "moe")
        texts = [" ".join(f"w{word}" for word in range(n, n + 20)) for n in range(8)]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / "lines.jsonl").write_text(lines, encoding="utf-8")
        edgemoe = [sys.executable, "-m", "edgemoe.cli", "calibrate", str(folder / "moe")]
        task = f"words={folder / 'lines.jsonl'}"
        stats = folder / "stats.safetensors"
        command = [*edgemoe, "--task", task, "-o", str(stats)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        statistics = Statistics.load(stats)
    plan = make_plan(statistics, "words", NAME, [4, 4, 4, 4])
    for layer in plan.layers:
        print(f"layer {layer.layer} keeps", [expert.members[0] for expert in layer.experts])
    return plan, statistics


if __name__ == "__main__":
    main()
