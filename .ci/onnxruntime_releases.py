"""Run bundles of every precision on several releases of onnxruntime: `make test-onnxruntime`.

Each release must run the bundles whose manifest asks for it or for less, with the answers of
the newest, and refuse the others by name. Releases are installed into build/onnxruntime/, some
60 MB each. Another interpreter is named before its release: `python3.10:1.23.2`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

FAMILIES = ("qwen3_moe", "gpt_oss", "qwen3_next", "nemotron_h")
GRAPHS = (
    ("cpu", "fp32"),
    ("cpu", "fp16"),
    ("cpu", "int8"),
    ("cpu", "int4"),
    ("tensorrt", "fp32"),
    ("jetson-orin", "fp16"),
)
RELEASES = ("1.23.2", "1.28.0", "1.30.0", "1.31.0", "1.32.0")
# Rounding differs a little between releases.
TOLERANCE = 1e-2

RUN = """
import json, sys
from edgemoe_runtime import EdgemoeRuntimeError, Session
found = {}
for bundle in sys.argv[1:]:
    try:
        with Session.open(bundle, providers=["cpu"]) as session:
            score = session.score("w5 w6 w9 w20", " w7 w8 w44 w90").log_likelihood
            text = session.generate("w5 w6", max_new_tokens=8).text
            found[bundle] = {"text": text, "score": score}
    except EdgemoeRuntimeError as error:
        found[bundle] = {"refused": str(error)}
print(json.dumps(found))
"""


def make_bundles(folder: Path) -> list[Path]:
    """Export tiny checkpoints in every precision that they have."""
    from edgemoe.errors import ExportError
    from edgemoe.models.tiny import write_tiny_checkpoint
    from edgemoe_exporters.export import export_bundle
    from edgemoe_exporters.request import ExportRequest

    made = []
    for family in FAMILIES:
        checkpoint = folder / family
        if not checkpoint.exists():
            write_tiny_checkpoint(family, checkpoint)
        for target, precision in GRAPHS:
            output = folder / f"{family}-{target}-{precision}"
            request = ExportRequest(
                model=checkpoint, output=output, target=target, precision=precision
            )
            try:
                if not output.exists():
                    export_bundle(request)
            except ExportError as error:
                print(f"{output.name}: not exported: {error}")
                continue
            made.append(output)
    return made


def run(spec: str, bundles: list[Path], folder: Path) -> dict[str, Any]:
    """Install a release and run all bundles on it."""
    python, _, release = spec.rpartition(":")
    python = python or sys.executable
    packages = folder / spec.replace("/", "_").replace(":", "-")
    if not packages.exists():
        wanted = [f"onnxruntime=={release}", "numpy", "tokenizers"]
        install = [python, "-m", "pip", "install", "--quiet", "--target", str(packages)]
        subprocess.run([*install, *wanted], check=True)
    runtime = Path(__file__).resolve().parent.parent / "runtime"
    environment = {"PYTHONPATH": f"{packages}:{runtime}", "PATH": "/usr/bin:/bin"}
    names = [str(bundle) for bundle in bundles]
    command = [python, "-W", "ignore", "-c", RUN, *names]
    done = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def judge(release: str, needed: str, found: dict[str, Any], expected: dict[str, Any]) -> str:
    """Say what a release made of a bundle; anything wrong begins with WRONG."""
    is_enough = [int(part) for part in release.split(".")[:2]] >= [
        int(part) for part in needed.split(".")
    ]
    refusal = found.get("refused")
    if is_enough:
        if refusal is not None:
            return f"WRONG: refused: {refusal}"
        same = found["text"] == expected["text"]
        near = abs(found["score"] - expected["score"]) < TOLERANCE
        return "runs" if same and near else f"WRONG: {found} instead of {expected}"
    named = f"must be {needed} or later" in (refusal or "") and release in (refusal or "")
    return "refused" if named else f"WRONG: {refusal or 'runs'}"


def main() -> int:
    """Run what was named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("releases", nargs="*", default=RELEASES, metavar="[PYTHON:]RELEASE")
    parser.add_argument("--folder", type=Path, default=Path("build/onnxruntime"))
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    bundles = make_bundles(folder)
    results = {spec: run(spec, bundles, folder) for spec in arguments.releases}
    newest = results[arguments.releases[-1]]
    wrong = 0
    for bundle in bundles:
        manifest = json.loads((bundle / "manifest.json").read_text())
        needed = manifest["needs_onnxruntime"]
        print(f"{bundle.name} needs {needed}")
        for spec, found in results.items():
            release = spec.rpartition(":")[2]
            outcome = judge(release, needed, found[str(bundle)], newest[str(bundle)])
            wrong += outcome.startswith("WRONG")
            print(f"  {spec}: {outcome}")
    count = len(bundles) * len(results)
    print(f"{count - wrong} passed, {wrong} failed")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
