"""Run a written graph in onnxruntime on the CPU, from its files, as it will be shipped."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime

from edgemoe.errors import ExportError
from edgemoe.progress import track
from edgemoe_exporters.validation.graph_calls import cache_shape, last_uses
from edgemoe_runtime.bundle.names import EXPERTS_USED
from edgemoe_runtime.execution_providers import MINIMUM_VERSION, release_numbers

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from edgemoe_exporters.validation.graph_calls import Call

# More would need logits of gigabytes.
_COUNTED_TOKENS = 512
_NUMPY = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
}


class GraphRunner:
    """A written graph in onnxruntime on the CPU, with its cache.

    Args:
        path: The graph; its weights lie beside it.
        threads: Threads to compute with; onnxruntime's choice by default.
        spins: Whether idle threads wait for work by spinning; those of two graphs that take
            turns would then slow each other down.

    Attributes:
        state: Tokens seen and the cache, by input; may be saved and restored.
        experts_used: How many experts the tokens of the latest call used, int64
            `[MoE layers]`; None where the graph does not count them.
        slice_count: 1: the graph runs as a whole.

    Raises:
        ExportError: onnxruntime cannot open the graph.
    """

    slice_count = 1

    def __init__(self, path: Path, threads: int | None = None, *, spins: bool = True) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = (
            3  # errors only: warnings tell of fusions that do not apply
        )
        if not spins:
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            self._session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's exceptions have no common base
            raise ExportError(
                f"onnxruntime {onnxruntime.__version__} must open the graph, got: "
                f"{error}. Install a tested version, or report it with the model's name."
            ) from error
        self._name = path.name
        self._outputs = [output.name for output in self._session.get_outputs()]
        self.state: tuple[int, dict[str, np.ndarray[Any, Any]]] = (0, {})
        self._k_cap: np.ndarray[Any, Any] | None = None
        self.experts_used: np.ndarray[Any, Any] | None = None

    def start(self, batch: int, k_cap: Sequence[int]) -> None:
        """Reset the cache.

        Args:
            batch: Rows of the next calls.
            k_cap: Most experts per token, for each MoE layer.
        """
        self._k_cap = np.asarray(k_cap, dtype=np.int64)
        past = {
            spec.name: np.zeros(cache_shape(spec.shape, batch, 0), _NUMPY[spec.type])
            for spec in self._session.get_inputs()
            if spec.name.startswith("past_key_values.")
        }
        self.state = (0, past)

    def run(
        self, ids: np.ndarray[Any, np.dtype[np.int64]]
    ) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Continue the rows.

        Args:
            ids: Next tokens, int64 `[batch, tokens]`.

        Returns:
            Logits, float32 `[batch, tokens, vocabulary]`.

        Raises:
            ExportError: onnxruntime cannot run the graph.
        """
        seen, past = self.state
        batch, total = len(ids), seen + ids.shape[1]
        feeds = {
            "input_ids": ids,
            "attention_mask": np.ones((batch, total), np.int64),
            "position_ids": np.tile(np.arange(seen, total), (batch, 1)),
            **past,
        }
        if self._k_cap is not None and self._k_cap.size:
            feeds["k_cap"] = self._k_cap
        try:
            results = dict(zip(self._outputs, self._session.run(None, feeds), strict=True))
        except Exception as error:  # onnxruntime's exceptions have no common base
            raise ExportError(
                f"onnxruntime {onnxruntime.__version__} must run {self._name}, got: {error}. "
                "Install a tested version, or report it with the model's name."
            ) from error
        present = {
            name: results[name.replace("past_key_values.", "present.", 1)] for name in past
        }
        self.state = (total, present)
        self.experts_used = results.get(EXPERTS_USED)
        logits: np.ndarray[Any, np.dtype[np.float32]] = results["logits"].astype(np.float32)
        return logits

    def mean_experts(self, ids: Sequence[int], k_cap: Sequence[int]) -> tuple[int, ...] | None:
        """Measure how many experts tokens use where they choose their number.

        Args:
            ids: Tokens of one text, at least one, of which the first 512 run.
            k_cap: Most experts per token, for each MoE layer.

        Returns:
            For each MoE layer the mean over the tokens, rounded up; None where the graph does
            not count them.
        """
        if EXPERTS_USED not in self._outputs:
            return None
        tokens = np.array([ids[:_COUNTED_TOKENS]], np.int64)
        self.start(1, k_cap)
        self.run(tokens)
        assert self.experts_used is not None
        return tuple(max(1, -(-int(used) // tokens.size)) for used in self.experts_used)

    def run_calls(
        self,
        calls: Sequence[Call],
        k_cap: Sequence[int],
        take: Callable[[int, np.ndarray[Any, np.dtype[np.float32]]], None],
    ) -> None:
        """Run calls; see `validation.graph_calls.Runner`."""
        states: dict[int, tuple[int, dict[str, np.ndarray[Any, Any]]]] = {}
        last = last_uses(calls)
        for number, call in enumerate(track(calls, "run the graph")):
            if call.after is None:
                self.start(len(call.ids), k_cap)
            else:
                self.state = states[call.after]
                if last[call.after] == number:
                    del states[call.after]
            logits = self.run(call.ids)
            if number in last:
                states[number] = self.state
            take(number, logits)


def check_engine(flavour: str) -> None:
    """Check that the installed onnxruntime computes the graphs of a flavour.

    Args:
        flavour: `ort` or `tensorrt`; only the former has operators of recent releases.

    Raises:
        ExportError: onnxruntime is too old.
    """
    if flavour == "ort" and release_numbers(onnxruntime.__version__) < MINIMUM_VERSION:
        needed = ".".join(map(str, MINIMUM_VERSION))
        raise ExportError(
            f"targets cpu and cuda need onnxruntime {needed} or later, got "
            f"{onnxruntime.__version__}, which lacks operators of their graphs. Update it "
            "(Python 3.10 gets 1.23 at most: use 3.11 or later), or choose a TensorRT target."
        )
