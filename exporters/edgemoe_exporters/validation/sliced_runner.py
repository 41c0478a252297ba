"""Run a written graph whose weights do not fit into memory: in slices, one after the other.

A slice is a run of nodes of the graph as it was written, in its order; its weights stay in the
graph's own file. It is cut where the fewest tensors that weights went into are alive, which is
between a residual addition and the next node, and holds as many weights as its budget
allows. Every call runs through one slice before the next slice is opened; a call's cache of
the slice's layers lives as long as the slice.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime
from safetensors.numpy import load_file, save_file

from edgemoe.errors import ExportError
from edgemoe.progress import counting
from edgemoe_exporters.validation.graph_calls import cache_shape, count_tokens, last_uses

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from edgemoe.resume import WorkDirectory
    from edgemoe_exporters.validation.graph_calls import Call

    Arrays = dict[str, np.ndarray[Any, Any]]

_PREFIX = "slices-"
_PROGRESS = f"{_PREFIX}progress.json"
_PAST, _PRESENT = "past_key_values.", "present."
_FOLDER_OPTION = "session.model_external_initializers_file_folder_path"


@dataclass(frozen=True)
class Slice:
    """A run of nodes.

    Attributes:
        start: Position of the first.
        stop: Position after the last.
        weight_bytes: Size of the weights in files that they read.
    """

    start: int
    stop: int
    weight_bytes: int


class SlicedRunner:
    """A written graph, run slice by slice; a `edgemoe_exporters.validation.graph_calls.Runner`.

    Args:
        path: The graph; its weights lie beside it.
        budget_bytes: Weights of a slice; one that cannot be cut may have more.
        work: Where outputs of finished slices are kept, so that interrupted calls resume after
            the last one; nothing is left there when they have ended.

    Attributes:
        slices: The slices.
        slice_count: Their number.
    """

    def __init__(
        self, path: Path, budget_bytes: int, work: WorkDirectory | None = None
    ) -> None:
        self._work = work
        self._folder = path.parent
        self._name = path.name
        self._model = onnx.load(str(path), load_external_data=False)
        graph = self._model.graph
        self._nodes = list(graph.node)
        self._initializers = {tensor.name: tensor for tensor in graph.initializer}
        self._graph_inputs = {value.name: value for value in graph.input}
        self._graph_outputs = [value.name for value in graph.output]
        self._reads = [list(dict.fromkeys(_reads(node))) for node in self._nodes]
        self._last_reads: dict[str, int] = {}
        for position, names in enumerate(self._reads):
            self._last_reads.update(dict.fromkeys(names, position))
        self.slices = self._cut(budget_bytes)
        self.slice_count = len(self.slices)

    def run_calls(
        self,
        calls: Sequence[Call],
        k_cap: Sequence[int],
        take: Callable[[int, np.ndarray[Any, np.dtype[np.float32]]], None],
    ) -> None:
        """Run calls; see `validation.graph_calls.Runner`."""
        totals = count_tokens(calls)
        given = [
            self._inputs_of(call, total, k_cap)
            for call, total in zip(calls, totals, strict=True)
        ]
        last = last_uses(calls)
        kept = _SliceProgress(self._work, self._digest(calls, k_cap))
        first, given = kept.recall(given)
        slices = self.slices[first:]
        with counting(len(slices) * len(calls), "run the graph in slices") as advance:
            for index, one in enumerate(slices, start=first):
                session = self._open(one, given[0])
                wanted = [value.name for value in session.get_outputs()]
                caches: dict[int, Arrays] = {}
                for number, call in enumerate(calls):
                    past = {} if call.after is None else caches[call.after]
                    if call.after is not None and last[call.after] == number:
                        del caches[call.after]
                    rows, new = call.ids.shape
                    no_past = (rows, totals[number] - new)
                    values = self._run(session, wanted, given[number], past, no_past)
                    if number in last:
                        caches[number] = {
                            name.replace(_PRESENT, _PAST, 1): array
                            for name, array in values.items()
                            if name.startswith(_PRESENT)
                        }
                    logits = values.pop("logits", None)
                    given[number] = {
                        name: array
                        for name, array in {**given[number], **values}.items()
                        if self._last_reads.get(name, -1) >= one.stop
                    }
                    if logits is not None:
                        take(number, logits.astype(np.float32))
                    advance()
                del session
                if one is not self.slices[-1]:
                    kept.keep(index + 1, given)
        kept.remove()

    def _digest(self, calls: Sequence[Call], k_cap: Sequence[int]) -> str:
        slices = [(one.start, one.stop) for one in self.slices]
        digest = hashlib.sha256(f"{self._name} {slices} {list(k_cap)}\n".encode())
        for call in calls:
            digest.update(f"{call.ids.shape} {call.after}\n".encode())
            digest.update(np.ascontiguousarray(call.ids).data)
        return digest.hexdigest()

    def _inputs_of(self, call: Call, total: int, k_cap: Sequence[int]) -> Arrays:
        batch, new = call.ids.shape
        arrays = {
            "input_ids": call.ids,
            "attention_mask": np.ones((batch, total), np.int64),
            "position_ids": np.tile(np.arange(total - new, total), (batch, 1)),
            "k_cap": np.asarray(k_cap, dtype=np.int64),
        }
        return {name: array for name, array in arrays.items() if name in self._graph_inputs}

    def _run(
        self,
        session: onnxruntime.InferenceSession,
        wanted: list[str],
        given: Arrays,
        past: Arrays,
        no_past: tuple[int, int],
    ) -> Arrays:
        batch, length = no_past
        feeds = {}
        for value in session.get_inputs():
            name = value.name
            if name.startswith(_PAST):
                empty = self._graph_inputs[name].type.tensor_type
                shape = [dim.dim_value for dim in empty.shape.dim]
                dtype = onnx.helper.tensor_dtype_to_np_dtype(empty.elem_type)
                # A slice may ask for the length of a cache that belongs to another one.
                zeros = np.zeros(cache_shape(shape, batch, length), dtype=dtype)
                feeds[name] = past.get(name, zeros)
            else:
                feeds[name] = given[name]
        try:
            return dict(zip(wanted, session.run(None, feeds), strict=True))
        except Exception as error:  # onnxruntime's exceptions have no common base
            raise ExportError(
                f"onnxruntime {onnxruntime.__version__} must run {self._name} in slices, got: "
                f"{error}. Install a tested version, or report it with the model's name."
            ) from error

    def _cut(self, budget_bytes: int) -> list[Slice]:
        allowed = self._find_cuts()
        slices: list[Slice] = []
        start = cut = 0
        held: dict[str, int] = {}
        since_cut: dict[str, int] = {}
        for position, names in enumerate(self._reads):
            for name in names:
                if name in self._initializers:
                    since_cut[name] = _file_bytes(self._initializers[name])
            if position not in allowed:
                continue
            if cut > start and sum({**held, **since_cut}.values()) > budget_bytes:
                slices.append(Slice(start, cut, sum(held.values())))
                start, held = cut, {}
            held.update(since_cut)
            since_cut = {}
            cut = position + 1
        held.update(since_cut)
        slices.append(Slice(start, len(self._nodes), sum(held.values())))
        return slices

    def _find_cuts(self) -> set[int]:
        """Return positions after which a cut passes on fewest tensors, and the last one."""
        heavy: set[str] = {
            name for name, tensor in self._initializers.items() if _file_bytes(tensor)
        }
        alive: set[str] = set()
        counts = []
        attended = []
        for position, (node, names) in enumerate(zip(self._nodes, self._reads, strict=True)):
            if heavy.intersection(names):
                heavy.update(node.output)
                alive.update(
                    name for name in node.output if self._last_reads.get(name, -1) > position
                )
            alive = {name for name in alive if self._last_reads[name] > position}
            counts.append(len(alive))
            if any(name.startswith(_PAST) for name in names):
                attended.append(position)
        last = len(self._nodes) - 1
        if not attended:
            return {last}
        first_seen, last_seen = attended[0], attended[-1]
        inner = [count for count in counts[first_seen : last_seen + 1] if count]
        least = min(inner, default=0)
        found = {
            position
            for position, count in enumerate(counts)
            if position >= first_seen and 0 < count <= least
        }
        # The embedding is as large as many a layer.
        before = [position for position in range(first_seen) if 0 < counts[position] <= least]
        return {*found, *before[:1], last}

    def _open(self, one: Slice, given: Arrays) -> onnxruntime.InferenceSession:
        nodes = self._nodes[one.start : one.stop]
        made = {name for node in nodes for name in node.output if name}
        read = dict.fromkeys(
            name for names in self._reads[one.start : one.stop] for name in names
        )
        model = onnx.ModelProto()
        model.CopyFrom(
            onnx.ModelProto(
                ir_version=self._model.ir_version, opset_import=self._model.opset_import
            )
        )
        graph = model.graph
        graph.name = f"{self._name}[{one.start}:{one.stop}]"
        graph.node.extend(nodes)
        for name in read:
            if name in self._graph_inputs:
                graph.input.append(self._graph_inputs[name])
            elif name not in made and name not in self._initializers:
                kind = onnx.helper.np_dtype_to_tensor_dtype(given[name].dtype)
                shape = [None] * given[name].ndim
                graph.input.append(onnx.helper.make_tensor_value_info(name, kind, shape))
            if name in self._initializers:
                graph.initializer.append(self._initializers[name])
        for name in sorted(made):
            if name in self._graph_outputs or self._last_reads.get(name, -1) >= one.stop:
                graph.output.append(onnx.ValueInfoProto(name=name))
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors only
        options.add_session_config_entry(_FOLDER_OPTION, str(self._folder))
        try:
            return onnxruntime.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's exceptions have no common base
            raise ExportError(
                f"onnxruntime {onnxruntime.__version__} must open a slice of {self._name}, got "
                f"{error}. Install a tested version, or report it with the model's name."
            ) from error


class _SliceProgress:
    """Outputs of finished slices, in files."""

    def __init__(self, work: WorkDirectory | None, digest: str) -> None:
        self._work = work
        self._digest = digest

    def recall(self, given: list[Arrays]) -> tuple[int, list[Arrays]]:
        """Return how many slices are finished, and the inputs of the next one."""
        done = None if self._work is None else self._work.read(_PROGRESS)
        if self._work is None or done is None or done["digest"] != self._digest:
            self.remove()
            return 0, given
        count = int(done["slices_done"])
        arrays = load_file(self._work.path / _given_name(count))
        recalled: list[Arrays] = [{} for _ in given]
        for key, array in arrays.items():
            number, _, name = key.partition("/")
            recalled[int(number)][name] = array
        return count, recalled

    def keep(self, count: int, given: list[Arrays]) -> None:
        """Record the inputs of the next slice."""
        if self._work is None:
            return
        name = _given_name(count)
        new = self._work.path / f"{name}.new"
        arrays = {
            f"{number}/{key}": np.asarray(array, order="C")
            for number, arrays in enumerate(given)
            for key, array in arrays.items()
        }
        save_file(arrays, new)
        self._work.commit(new, name)
        self._work.write(_PROGRESS, {"digest": self._digest, "slices_done": count})
        self._work.remove(_given_name(count - 1))

    def remove(self) -> None:
        """Remove the record."""
        if self._work is not None:
            self._work.remove(_PROGRESS)
            for path in self._work.path.glob(f"{_PREFIX}*"):
                self._work.remove(path.name)


def _given_name(count: int) -> str:
    return f"{_PREFIX}given-{count:05}.safetensors"


def weight_bytes(path: Path) -> int:
    """Return the size of the weights that a written graph has in files."""
    model = onnx.load(str(path), load_external_data=False)
    return sum(_file_bytes(tensor) for tensor in model.graph.initializer)


def stored_bytes(path: Path) -> int:
    """Return the bytes in files that a written graph reads; those of two tensors once."""
    model = onnx.load(str(path), load_external_data=False)
    ranges = {
        tuple(sorted((entry.key, entry.value) for entry in tensor.external_data)): tensor
        for tensor in model.graph.initializer
    }
    return sum(_file_bytes(tensor) for tensor in ranges.values())


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    """Yield the names that a node and its branches read from outside."""
    yield from (name for name in node.input if name)
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            made = {name for inner in graph.node for name in inner.output}
            made.update(tensor.name for tensor in graph.initializer)
            made.update(value.name for value in graph.input)
            for inner in graph.node:
                yield from (name for name in _reads(inner) if name not in made)
            # A branch may give an outer value as it is.
            yield from (out.name for out in graph.output if out.name not in made)


def _file_bytes(tensor: onnx.TensorProto) -> int:
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return 0
    return next(
        (int(entry.value) for entry in tensor.external_data if entry.key == "length"), 0
    )
