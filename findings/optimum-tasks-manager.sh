#!/usr/bin/env bash
# optimum 2.3.0: which model types its TasksManager can export.
#
# Guess:  the class that maps model types to exporters lists those of transformers that export to
#         ONNX, qwen3_moe among them, as that of 1.27 does.
# Actual: the list is empty. Exporters register themselves when they are imported, and since 2.0
#         the one for ONNX is another package, optimum-onnx, which wants transformers < 4.58
#         (version 0.1.0). Asked about qwen3_moe it raises a KeyError that says "Only [] are supported".
#
# Exit status 0: still so. Needs Python 3.11 or later and a package index that has a build of torch
# (for CPUs: some 200 MB; set PIP_EXTRA_INDEX_URL to PyTorch's index of such); three minutes.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
unset PYTHONPATH
export HF_HUB_OFFLINE=1

"${PYTHON:-python3}" -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install --quiet torch==2.13.0
"$scratch/venv/bin/pip" install --quiet torch==2.13.0 optimum==2.3.0 transformers==5.23.0 requests

"$scratch/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

from optimum.exporters.tasks import TasksManager

supported = TasksManager.get_supported_model_type_for_task("text-generation", "onnx")
try:
    TasksManager.get_supported_tasks_for_model_type("qwen3_moe", "onnx", library_name="transformers")
    answer = "qwen3_moe is supported"
except KeyError as error:
    answer = f"KeyError: {error.args[0]}"
loader = TasksManager.get_model_class_for_task("text-generation", model_type="qwen3_moe").__name__

print(f"optimum {version('optimum')}, transformers {version('transformers')}")
print(f"model types for text-generation to ONNX: {supported}")
print(f"qwen3_moe: {answer}")
print(f"its class for text-generation: {loader}")
assert supported == []
assert "Only [] are supported" in answer
assert loader == "AutoModelForCausalLM"
PYTHON
