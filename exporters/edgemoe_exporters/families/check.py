"""Check a family on a tiny random checkpoint: prune, save, reload, export, build an engine."""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from edgemoe.apply.in_memory import apply_plan
from edgemoe.calibrate.collect import collect
from edgemoe.errors import EdgemoeError, ExportError, StreamingError
from edgemoe.models.checkpoint import load_model, load_tokenizer
from edgemoe.models.layers.factored import factor_layer, split_by_svd
from edgemoe.models.loading import quiet_transformers
from edgemoe.models.registry import find_family
from edgemoe.models.saving import save_model
from edgemoe.models.tiny import VOCAB_SIZE, write_tiny_checkpoint
from edgemoe.prune.registry import make_plan
from edgemoe.tasks import TaskFile
from edgemoe_exporters.compiler.compile import compile_bundle
from edgemoe_exporters.export import export_bundle
from edgemoe_exporters.request import ExportRequest
from edgemoe_exporters.tracing.prepare.model import check_exportable
from edgemoe_runtime.bundle.names import MANIFEST_FILE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from edgemoe.models.contract import MoeModel

# SM 8.6, as of an RTX 30 or an A10: one engine tells whether TensorRT takes the graph.
_CAPABILITY = 86
_LINES, _WORDS = 12, 20
_RANK = 12

# The steps, in order; the last four are graphs.
STEPS: dict[str, str] = {
    "identity": "all experts kept give the same logits, bit by bit",
    "uniform": "as many experts in each layer, opened by plain transformers: same weights",
    "ragged": "a different number in each layer, saved and opened again: same weights",
    "factored": "the first of these factored by SVD, saved and opened again: same weights",
    "ort": "that checkpoint exported for onnxruntime in fp32: largest logit difference to "
    "eager transformers, over prefill and decode with the cache",
    "streamed": "the same as if it were larger than memory, one layer at a time: same bytes; "
    "*loaded whole* where layers run several times for a token",
    "tensorrt": "as *ort* for TensorRT, run in onnxruntime",
    "engine": "its TensorRT graph in fp16 built by TensorRT for RTX (SM 8.6)",
}


@dataclass
class FamilyReport:
    """Results of one family.

    Attributes:
        family: Its name in config.json.
        results: For each of `STEPS` that ran `yes`, a number, or `no: reason`.
        seconds: How long it took.
    """

    family: str
    results: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def failed(self) -> list[str]:
        """ExportCheckpointing that did not hold, other than graphs that are refused by name."""
        return [
            name
            for name, result in self.results.items()
            if result.startswith("no") and not result.startswith("no graph")
        ]


def check_family(family: str, *, graphs: bool = True, engine: bool = True) -> FamilyReport:
    """Check one family.

    Args:
        family: Its name in config.json.
        graphs: Whether to export.
        engine: Whether to build an engine, too; needs `tensorrt-rtx`.

    Returns:
        The results. A step that fails is reported, not raised.
    """
    began = time.perf_counter()
    report = FamilyReport(family)
    with tempfile.TemporaryDirectory(prefix="edgemoe-family-") as name:
        trial = _Trial(Path(name), family)
        for step, act in trial.steps(graphs=graphs, engine=graphs and engine):
            report.results[step] = _outcome(act)
            if report.results[step].startswith("no"):
                break
    report.seconds = time.perf_counter() - began
    return report


def _outcome(act: Callable[[], str]) -> str:
    try:
        return act()
    except ExportError as error:
        return f"no graph: {error}"
    except EdgemoeError as error:
        return f"no: {error}"
    except Exception as error:  # a row of a table must not end the table
        return f"no: {type(error).__name__}: {error}"


class _Trial:
    """One family under trial, in a folder."""

    def __init__(self, folder: Path, family: str) -> None:
        self.folder, self.family = folder, family
        self.whole = folder / "whole"
        self.ragged, self.factored = folder / "ragged", folder / "factored"

    def steps(self, *, graphs: bool, engine: bool) -> Iterator[tuple[str, Callable[[], str]]]:
        yield "identity", self.keep_all
        yield "uniform", self.uniform
        yield "ragged", self.differing
        yield "factored", self.factor
        if graphs:
            yield "ort", lambda: self.export("cpu", "fp32")
            yield "streamed", self.stream
            yield "tensorrt", lambda: self.export("tensorrt-rtx", "fp32")
        if engine:
            yield "engine", self.build

    def keep_all(self) -> str:
        write_tiny_checkpoint(self.family, self.whole)
        model = load_model(self.whole)
        before = _logits(model)
        for layer in model.layers:
            layer.keep(range(layer.num_experts))
        _same(_logits(model), before)
        return "yes"

    def uniform(self) -> str:
        path, small = self._prune("uniform", lambda _: 1)
        with quiet_transformers():
            # The automatic classes of transformers do not know every family.
            stock = find_family(self.family).causal_lm.from_pretrained(str(path)).eval()
        _same_model(stock, small)
        return "yes"

    def differing(self) -> str:
        path, small = self._prune("ragged", lambda position: 1 + position % 3)
        _same_model(load_model(path).model, small)
        return "yes"

    def factor(self) -> str:
        model = load_model(self.ragged)
        factor_layer(model.layers[0], split_by_svd(model.layers[0], _RANK))
        self.factored.mkdir()
        save_model(model, self.factored, source=self.whole)
        _same_model(load_model(self.factored).model, model)
        return "yes"

    def export(self, target: str, precision: str) -> str:
        check_exportable(self.factored, precision)
        request = ExportRequest(
            model=self.factored,
            output=self.folder / f"{target}-{precision}",
            target=target,
            precision=precision,
        )
        (task,) = export_bundle(request).tasks.values()
        return f"{task.parity.max_abs_logit_difference:.1e}"

    def stream(self) -> str:
        request = ExportRequest(
            model=self.factored,
            output=self.folder / "streamed",
            target="cpu",
            precision="fp32",
            memory_limit_bytes=0,
        )
        try:
            report = export_bundle(request)
        except StreamingError:  # of models that run a layer several times for a token
            return "loaded whole"
        for file in sorted(report.output.iterdir()):
            # The manifest records how the graph was compared.
            other = self.folder / "cpu-fp32" / file.name
            if file.name != MANIFEST_FILE and file.read_bytes() != other.read_bytes():
                raise EdgemoeError(f"{file.name} must have the same bytes, got others.")
        return "yes" if report.streamed else "loaded whole"

    def build(self) -> str:
        self.export("tensorrt-rtx", "fp16")
        bundle = self.folder / "tensorrt-rtx-fp16"
        (engine,) = compile_bundle(
            bundle, "tensorrt-rtx", compute_capabilities=[_CAPABILITY], max_sequence=32
        )
        return f"yes, {engine.size_bytes / 1e6:.1f} MB"

    def _prune(self, name: str, dropped: Callable[[int], int]) -> tuple[Path, MoeModel]:
        """Drop experts by REAP, so many of each group; return checkpoint and pruned model."""
        model = load_model(self.whole)
        tasks = self.folder / "task.jsonl"
        tasks.write_text("".join(json.dumps({"text": line}) + "\n" for line in _lines()))
        task = TaskFile.load("words", tasks)
        statistics = collect(model, [task], load_tokenizer(self.whole))
        counts = [
            max(layer.min_experts, layer.num_experts - dropped(position) * layer.n_group)
            for position, layer in enumerate(model.shape.layers)
        ]
        small = apply_plan(model, make_plan(statistics, "words", "reap", counts))
        path = self.folder / name
        path.mkdir()
        save_model(small, path, source=self.whole)
        return path, small


def _lines() -> list[str]:
    draw = np.random.default_rng(0)
    return [
        " ".join(f"w{word}" for word in draw.integers(3, VOCAB_SIZE, _WORDS))
        for _ in range(_LINES)
    ]


def _ids() -> torch.Tensor:
    return torch.randint(3, VOCAB_SIZE, (2, 11), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def _logits(model: MoeModel) -> torch.Tensor:
    logits: torch.Tensor = model.model(input_ids=_ids(), use_cache=False).logits
    return logits


@torch.no_grad()
def _same_model(found: Any, expected: MoeModel) -> None:
    weights = expected.model.state_dict()
    for name, tensor in found.state_dict().items():
        _same(tensor, weights[name])
    logits = found(input_ids=_ids(), use_cache=False).logits
    # Products round differently on memory that is mapped from a file at an odd offset.
    if not torch.allclose(logits, _logits(expected), atol=1e-4):
        raise EdgemoeError(
            "a model with the same weights must give the same logits, got others."
        )


def _same(found: torch.Tensor, expected: torch.Tensor) -> None:
    if not torch.equal(found, expected):
        difference = float((found - expected).abs().max())
        raise EdgemoeError(
            f"numbers must be equal bit by bit, got a difference of {difference}."
        )
